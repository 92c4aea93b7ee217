"""Every causal class of Transformers with every method: measured on tiny random models, not written down.

    python docs/family_sweep.py                  # all of them, into docs/families.json and docs/families.md
    python docs/family_sweep.py Llama JetMoe     # these alone, printed and put in the place of what was measured before

`tests/tiny_models.py` makes the models by rules about field names. A class that the rules cannot make small, or that
does not generate unpatched, is listed with the reason. Every other one runs every method in three ways:

- settings that leave keys out, on two prompts of which one is padded on the left, with the cache that `generate` makes;
  the logits must be those of the model's own eager attention under the masks of the very plans that ran;
- settings that keep everything, on the same prompts, where the logits must be those of the unpatched model;
- the same on one prompt with a static cache, where the unpatched model takes one.

All runs of a class are made to write the same tokens, so that logits can be compared step by step. A class runs in a
process of its own with a limit of time: its crash is a row of the table.
"""

import argparse
import inspect
import json
import multiprocessing
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, LogitsProcessor, LogitsProcessorList
from transformers import PreTrainedModel
from transformers.masking_utils import eager_mask
from transformers.utils import logging

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from method_table import DECODE_METHODS, PREFILL_METHODS, SPAN_METHODS, TOKEN_METHODS, write_plans  # noqa: E402
from tiny_models import HEADS, HIDDEN, VOCAB, causal_classes, tiny_models  # noqa: E402

from sparse_patch import SparsePatchError, capture_plans, patched, sparsity_report  # noqa: E402
from sparse_patch.methods.base import registry  # noqa: E402
from sparse_patch.methods.layer_roles import LayeredMethod  # noqa: E402
from sparse_patch.model_shape import ModelShape  # noqa: E402
from sparse_patch.patching import versions  # noqa: E402
from sparse_patch.plans import Dense  # noqa: E402
from sparse_patch.report import SparsityReport  # noqa: E402

Settings = dict[str, Any]
KINDS = {"prefill": PREFILL_METHODS, "decode": DECODE_METHODS, "spans": SPAN_METHODS, "token blocks": TOKEN_METHODS}
METHODS = tuple(dict.fromkeys(case.small["method"] for cases in KINDS.values() for case in cases))
LENGTH, PADDING, NEW = 200, 30, 5
TOLERANCE = 1e-4  # relative RMS
LIMIT = 120  # seconds for a class
ORACLE = "sweep_oracle"
SPARSE, DENSE, REFUSED, WRONG, RAW, LATE, UNTRUE = "sparse", "dense", "refused", "WRONG", "RAW", "LATE", "UNTRUE"
JSON, MARKDOWN = ROOT / "docs" / "families.json", ROOT / "docs" / "families.md"


class NotShrunk(Exception):
    """A class has no tiny model that generates; the message is the reason."""


@dataclass(frozen=True)
class Way:
    """One way to run a model: its inputs, and whether its cache is static."""

    rows: int
    static: bool = False

    def inputs(self) -> dict[str, Any]:
        ids = torch.randint(3, VOCAB - 6, (2, LENGTH), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        mask[0, :PADDING] = 0
        inputs = {"input_ids": ids, "attention_mask": mask} if self.rows == 2 else {"input_ids": ids[1:]}
        return {**inputs, "cache_implementation": "static"} if self.static else inputs


PADDED, ALONE, STATIC = Way(2), Way(1), Way(1, static=True)


class Dictated(LogitsProcessor):
    """Every run writes the same tokens, whatever it would have chosen."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = 5 + 7 * (input_ids.shape[1] - LENGTH) % (VOCAB - 10)
        dictated = torch.full_like(scores, -torch.inf)
        dictated[:, token] = 0
        return dictated


@torch.no_grad()
def logits_of(model: PreTrainedModel, way: Way) -> torch.Tensor:
    """What `generate` has for each step, `[steps, B, vocabulary]`."""
    torch.manual_seed(0)  # Reformer hashes at random
    result: Any = model.generate(  # type: ignore[operator]
        **way.inputs(),
        max_new_tokens=NEW,
        do_sample=False,
        disable_compile=True,
        logits_processor=LogitsProcessorList([Dictated()]),
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(result.logits).float()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative RMS of the worst step and row; infinite if something is not finite."""
    if found.shape != expected.shape or not bool(found.isfinite().all()):
        return torch.inf
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


class Probe:
    """One class, as a tiny model, and what its methods do."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model, self.padded = _model_that_generates(name)
        self.text = self.model.config.get_text_config(decoder=True)
        self.alone, self.alone_way = self._alone()

    def _alone(self) -> tuple[torch.Tensor, Way]:
        """The unpatched logits of one prompt, on a static cache where the model takes one."""
        try:
            logits = logits_of(self.model, STATIC)
            if bool(logits.isfinite().all()):
                return logits, STATIC
        except Exception:  # what the class says of static caches is its own affair
            pass
        return logits_of(self.model, ALONE), ALONE

    @property
    def describes(self) -> str:
        """The sizes of the tiny model."""
        return description(self.model)

    def method(self, name: str) -> str:
        """What one method does: an outcome, and the reason where it has one."""
        with TemporaryDirectory() as folder:
            try:
                small, full = settings_of(name, self.model, Path(folder))
                return self._outcome(small, full)
            except SparsePatchError as error:
                return self._refusal(str(error).replace(f"{folder}/", ""))
            except Exception as error:
                return f"{RAW}: {_where(error)}"

    def _refusal(self, message: str) -> str:
        message = message.removeprefix("dict: ")
        untrue = what_is_untrue(message, self.model)
        return f"{UNTRUE}: {message} ({untrue})" if untrue else f"{REFUSED}: {message}"

    def _outcome(self, small: Settings, full: Settings) -> str:
        reports: list[SparsityReport] = []
        for config, way in ((small, PADDED), (full, PADDED), (full, self.alone_way)):
            with patched(self.model, config), capture_plans(self.model) as plans:
                try:
                    logits = logits_of(self.model, way)
                except SparsePatchError as error:
                    return f"{LATE}: {error}"
                reports.append(sparsity_report(self.model))
            what = "kept all" if config is full else "left keys out"
            with self._under_masks(plans if config is small else {}):
                expected = logits_of(self.model, way) if config is small else self._unpatched(way)
            off = distance(logits, expected)
            if not off <= TOLERANCE:
                return f"{WRONG}: {off:.2g} off, {what}, {'padded' if way is PADDED else 'static' if way.static else 'alone'}"
        return what_ran(reports[0])

    def _unpatched(self, way: Way) -> torch.Tensor:
        return self.padded if way is PADDED else self.alone

    @contextmanager
    def _under_masks(self, captured: dict[int, Any]) -> Iterator[None]:
        """The model as it is, with its eager attention under the masks of plans in the calls that had one."""
        if not any(not isinstance(plan, Dense) for plans in captured.values() for _, plan in plans):
            yield
            return
        left = {layer: iter(plans) for layer, plans in captured.items()}

        def attend(
            module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention_mask: Any, **kwargs: Any
        ) -> Any:
            _, plan = next(left.get(module.layer_idx, iter(())), (None, None))
            if plan is not None and not isinstance(plan, Dense):
                attention_mask = torch.zeros(()).where(plan.mask(), torch.finfo(q.dtype).min)
            return eager_attention_of(module)(module, q, k, v, attention_mask, **kwargs)

        before = self.text._attn_implementation
        AttentionInterface.register(ORACLE, attend)
        AttentionMaskInterface.register(ORACLE, eager_mask)
        self.text._attn_implementation = ORACLE
        try:
            yield
        finally:
            self.text._attn_implementation = before

    def restored(self) -> str | None:
        """Whether the model computes what it computed before all patches; None, or how far off it is."""
        off = distance(logits_of(self.model, PADDED), self.padded)
        return None if off == 0 else f"{WRONG}: {off:.2g} off after unpatching"


def eager_attention_of(module: torch.nn.Module) -> Callable[..., Any]:
    scope: dict[str, Any] = inspect.unwrap(module.forward).__globals__
    function: Callable[..., Any] = scope["eager_attention_forward"]
    return function


def _model_that_generates(name: str) -> tuple[PreTrainedModel, torch.Tensor]:
    """The tiny model, and its unpatched logits of the padded prompts."""
    reason = ""
    models = tiny_models(name)
    for build in models:
        try:
            model = build()
            logits = logits_of(model, PADDED)
        except Exception as error:
            reason = _said(error)
            continue
        if bool(logits.isfinite().all()) and bool(logits.any()):
            return model, logits
        reason = "its logits are not finite"
    raise NotShrunk(reason)


def _said(error: BaseException) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _where(error: BaseException) -> str:
    """An exception, and where in the package it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/sparse_patch/" in frame.filename]
    places = [f"{Path(frame.filename).name}:{frame.name}" for frame in (ours[-1:] + frames[-1:])]
    return f"{_said(error)} at {' in '.join(dict.fromkeys(reversed(places)))}"


def settings_of(name: str, model: PreTrainedModel, folder: Path) -> tuple[Settings, Settings]:
    """Settings of a method that leave out a part of `LENGTH` tokens, and settings that keep everything."""
    if name == "dense":
        return {"both": {"method": "dense"}}, {"both": {"method": "dense"}}
    case = next(case for cases in KINDS.values() for case in cases if case.small["method"] == name)
    # Logits of random queries and keys lie in the tens, of a single KV head not one half streams, and of blocks of
    # 64 tokens there are four.
    changes = {
        "sale": {"tau": 1e12},
        "duoattention": {"sparsity": 1.0},
        "infllmv2": {"topk": 2, "init_blocks": 0},
    }.get(name, {})
    shared: Settings = {"layers": "all"}
    if issubclass(registry()[name], LayeredMethod):
        shared = {"layers": {"full": [], "select": [first_full_layer(model)]}}
    if "calibration" in case.small:
        write_plans(folder, shape_of(model))
    phases = registry()[name].phases
    place = phases[0] if len(phases) == 1 else "both"
    made = []
    for settings in ({**case.small, **changes}, case.full):
        files = {"calibration": f"{folder}/{settings['calibration']}"} if "calibration" in settings else {}
        made.append({place: {**settings, **shared, **files}, "on_unsupported": "silent"})
    return made[0], made[1]


def layers_of(model: PreTrainedModel) -> list[int]:
    """The layers whose attention asks Transformers' attention interface."""
    text = model.config.get_text_config(decoder=True)
    of = [module for module in model.modules() if asks_the_interface(module) and module.config is text]
    return sorted({module.layer_idx for module in of if isinstance(getattr(module, "layer_idx", None), int)})


def kind_of(model: PreTrainedModel, layer: int) -> str:
    """ "full", or what else the config says of a layer; in hybrid layers full attention runs beside a linear one."""
    text = model.config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None)
    windowed = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    kind = str(kinds[layer]).removesuffix("_attention") if kinds else "sliding" if windowed else "full"
    return "full" if kind == "hybrid" else kind


def first_full_layer(model: PreTrainedModel) -> int:
    """The first layer with full attention; the first with any if there is none."""
    layers = layers_of(model) or [0]
    return next((layer for layer in layers if kind_of(model, layer) == "full"), layers[0])


def shape_of(model: PreTrainedModel) -> ModelShape:
    """The shape that files are made for; any if there is no attention."""
    layers = layers_of(model)
    return ModelShape.of(model.config, 1 + layers[-1]) if layers else ModelShape("none", 1, HEADS, 2, HIDDEN)


def what_ran(report: SparsityReport) -> str:
    """ "sparse", or dense with the reasons of all calls."""
    reasons: set[str] = set()
    for layer in report.layers:
        for phase in (layer.prefill, layer.decode):
            if phase.sparse_calls:
                return SPARSE
            reasons |= {reason for reason in (*phase.dense, *phase.fallbacks) if not reason.startswith("no ")}
    return f"{DENSE}: {'; '.join(sorted(reasons))}"


def description(model: PreTrainedModel) -> str:
    text = model.config.get_text_config(decoder=True)
    layers = getattr(text, "num_hidden_layers", None)
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    counted = {str(kind).removesuffix("_attention"): list(kinds).count(kind) for kind in kinds}
    of = f" ({', '.join(f'{number} {kind}' for kind, number in counted.items())})" if counted else ""
    heads = getattr(text, "num_attention_heads", None)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    size = sum(parameter.numel() for parameter in model.parameters())
    shape = f", {heads} heads on {kv_heads}" if isinstance(heads, int) else ""
    return f"{layers} layers{of}{shape}, {size // 1000}k parameters"


# --- whether a refusal says the truth --------------------------------------------------------------------------------


def asks_the_interface(module: torch.nn.Module) -> bool:
    """Whether a module's forward asks Transformers' attention interface."""
    code = getattr(inspect.unwrap(module.forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def attends(module: torch.nn.Module) -> bool:
    """Whether a module is attention by its own code: through the interface, or with a softmax of its own."""
    if asks_the_interface(module):
        return True
    name = type(module).__name__.lower()
    if not ("attention" in name or "attn" in name) or not any(True for _ in module.children()):
        return False
    source = inspect.getsource(type(module))
    return any(word in source for word in ("softmax", "logsumexp", "scaled_dot_product_attention"))


def what_is_untrue(message: str, model: PreTrainedModel) -> str | None:
    """What a refusal claims and the model does not bear out; None if nothing is found."""
    attention = [module for module in model.modules() if attends(module)]
    inside = [module for module in attention if asks_the_interface(module)]
    if "decoder-only" in message and not model.config.is_encoder_decoder:
        return "the model is decoder-only"
    if re.search(r"(found|has) no (causal self-)?attention", message) and attention:
        return f"it has {type(attention[0]).__name__}"
    layer = re.search(r"layer (\d+) has no full attention", message)
    if layer and kind_of(model, int(layer[1])) == "full":
        return f"layer {layer[1]} has full attention"
    if "attention interface" in message and len(inside) == len(attention):
        return "all its attention asks the interface"
    return None


# --- all of them -----------------------------------------------------------------------------------------------------


def measure(name: str, methods: Iterable[str] = ("dense", *METHODS)) -> dict[str, Any]:
    """What one class does: the tiny model and by outcome the methods, or why there is none."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    started = time.monotonic()
    try:
        probe = Probe(name)
    except NotShrunk as error:
        return {"not shrunk": str(error)}
    outcomes: dict[str, list[str]] = {}
    for method in methods:
        outcomes.setdefault(probe.method(method), []).append(method)
    if (wrong := probe.restored()) is not None:
        outcomes.setdefault(wrong, []).append("unpatched")
    found = {"model": probe.describes, "static cache": probe.alone_way.static, "methods": outcomes}
    return found | {"seconds": round(time.monotonic() - started, 1)}


def _send(pipe: Connection, name: str) -> None:
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1), os.dup2(nothing.fileno(), 2)
        pipe.send(measure(name))


def in_a_process(name: str) -> dict[str, Any]:
    """`measure` in a process of its own: it may crash or hang."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_send, args=(sender, name))
    process.start()
    sender.close()
    try:
        found: dict[str, Any] = receiver.recv() if receiver.poll(LIMIT) else {"not shrunk": f"took more than {LIMIT} s"}
    except EOFError:
        process.join()
        found = {"methods": {f"{RAW}: the process ended with {process.exitcode}": list(METHODS)}, "model": "?"}
    process.kill()
    process.join()
    return found


if __name__ == "__main__":
    names=[n if n in causal_classes() else n+"ForCausalLM" for n in sys.argv[1:]] or list(causal_classes())
    from concurrent.futures import ThreadPoolExecutor
    t=time.time()
    out={}
    with ThreadPoolExecutor(2) as pool:
        for n,r in zip(names,pool.map(in_a_process,names)):
            out[n]=r
            print(n, json.dumps(r), flush=True)
    json.dump(out, open("/tmp/sw_out.json","w"), indent=1)
    print(time.time()-t)
