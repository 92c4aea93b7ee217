"""Every causal class of Transformers with every method: measured on tiny random models, not written down.

    python docs/family_sweep.py                  # all of them, into docs/families.json and docs/families.md
    python docs/family_sweep.py Llama JetMoe     # only these, printed and put in the place of what was measured before

`tests/tiny_models.py` makes the models by rules about field names. A class that the rules cannot make small, or that
does not generate unpatched, is listed with the reason. Every other one runs every method in three ways:

- settings that leave keys out, on two prompts of which one is padded on the left, with the cache that `generate` makes;
  the logits must be those of the model's own eager attention under the masks of the very plans that ran;
- settings that keep everything, on the same prompts, where the logits must be those of the unpatched model;
- the same on one prompt with a static cache, where the unpatched model answers with one as it does without.

All runs of a class are made to write the same tokens, so that logits can be compared step by step. A class runs in a
process of its own with a limit of time: its crash is a row of the table.
"""

import argparse
import difflib
import inspect
import json
import multiprocessing
import os
import re
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
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
Found = dict[str, Any]  # of a class: what `measure` returns
CASES = {"prefill": PREFILL_METHODS, "decode": DECODE_METHODS, "spans": SPAN_METHODS, "token blocks": TOKEN_METHODS}
KINDS = {
    "dense": ["dense"],
    **{kind: list(dict.fromkeys(case.small["method"] for case in cases)) for kind, cases in CASES.items()},
}
METHODS = [method for methods in KINDS.values() for method in methods]
LENGTH, PADDING, NEW = 200, 30, 5
TOLERANCE = 1e-4  # relative RMS
LIMIT = 300  # seconds for a class
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

    @property
    def says(self) -> str:
        return f"{self.rows} prompts" if self.rows > 1 else "static cache" if self.static else "one prompt"

    def inputs(self) -> dict[str, Any]:
        """Arguments of `generate`; of two prompts the first is padded."""
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
        """The unpatched logits of one prompt, on a static cache where the model answers the same with one."""
        alone = logits_of(self.model, ALONE)
        try:
            static = logits_of(self.model, STATIC)
        except Exception:  # what the class says of static caches is its own affair
            return alone, ALONE
        return (static, STATIC) if distance(static, alone) <= TOLERANCE else (alone, ALONE)

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
                return f"{WRONG}: {off:.2g} off, {what}, {way.says}"
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
    for build in tiny_models(name):
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
    case = next(case for cases in CASES.values() for case in cases if case.small["method"] == name)
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
    layers: set[Any] = {getattr(module, "layer_idx", None) for module in of}
    return sorted(layer for layer in layers if isinstance(layer, int) and layer >= 0)


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
            reasons |= {*phase.dense, *phase.fallbacks} - {
                "no prefill method",
                "no decode method",
                "layer not selected",
            }
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


def _all_of(model: PreTrainedModel, name: str, holds: Callable[[Any], bool]) -> bool:
    """Whether something holds for all modules of a class, and there are any."""
    modules = [module for module in model.modules() if type(module).__name__ == name]
    return bool(modules) and all(holds(module) for module in modules)


def _written(pattern: str) -> Callable[[Any], bool]:
    """Whether the code of a module's class has something in it."""
    return lambda module: re.search(pattern, inspect.getsource(type(module))) is not None


Claim = Callable[[PreTrainedModel, re.Match[str]], bool]
# What refusals say, and whether that is so; the first pattern that a message has in it counts.
CLAIMS: dict[str, Claim] = {
    r"trust_remote_code|other patch": lambda *_: False,  # all classes are Transformers' own, and nobody changed them
    r"do not ask .* first \S+ \(\S+\.(\w+)\)": lambda model, says: _all_of(
        model, says[1], lambda module: not asks_the_interface(module)
    ),
    r"has no attention": lambda model, _: not any(attends(module) for module in model.modules()),
    r"decoder-only": lambda model, _: model.config.is_encoder_decoder,
    r"(\w+) says that it is not causal": lambda model, says: _all_of(model, says[1], lambda it: not it.is_causal),
    r"(\w+) has another config": lambda model, says: _all_of(
        model, says[1], lambda it: it.config is not model.config.get_text_config(decoder=True)
    ),
    r"(\w+) computes by the name": lambda model, says: _all_of(
        model, says[1], _written(r"_attn_implementation (in|not in|==|!=) ")
    ),
    r"(\w+) changes its mask only if": lambda model, says: _all_of(
        model, says[1], _written(r"isinstance\(attention_mask, torch\.Tensor\)")
    ),
    r"(\w+) does not say .*\(layer_idx is (\S+)\)": lambda model, says: _all_of(
        model,
        says[1],
        lambda it: str(it.layer_idx) == says[2] and "layer_idx" in inspect.signature(it.forward).parameters,
    ),
    r"(\S+) and (\S+) are both of layer (\d+)": lambda model, says: (
        says[1] != says[2] and {model.get_submodule(name).layer_idx for name in says.groups()[:2]} == {int(says[3])}
    ),
    r"layer (\d+) has no full attention": lambda model, says: kind_of(model, int(says[1])) != "full",
    r"every layer .* has local attention": lambda model, _: "full" not in {kind_of(model, i) for i in layers_of(model)},
    r"no layer of \d+ is left": lambda model, _: [kind_of(model, i) for i in layers_of(model)].count("full") < 2,
}


def what_is_untrue(message: str, model: PreTrainedModel) -> str | None:
    """What a refusal claims and the model does not bear out; None if it does."""
    for pattern, holds in CLAIMS.items():
        if says := re.search(pattern, message):
            return None if holds(model, says) else f"not so: {says[0]}"
    return "nothing checks whether that is so"


# --- all of them -----------------------------------------------------------------------------------------------------


def measure(name: str, methods: Iterable[str] = METHODS) -> Found:
    """What one class does: the tiny model and by outcome the methods, or why there is none."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    try:
        probe = Probe(name)
    except NotShrunk as error:
        return {"not shrunk": str(error)}
    outcomes: dict[str, list[str]] = {}
    for method in methods:
        outcomes.setdefault(probe.method(method), []).append(method)
    if (wrong := probe.restored()) is not None:
        outcomes.setdefault(wrong, []).append("unpatched")
    return {"model": description(probe.model), "static cache": probe.alone_way.static, "methods": outcomes}


@dataclass(frozen=True)
class Job:
    """The process that measures a class."""

    name: str
    process: Any
    deadline: float

    def found(self, pipe: Connection) -> Found:
        """What it sent, or how it ended."""
        try:
            if pipe.poll():
                return self._ended(pipe.recv())
            outcome = f"{RAW}: took more than {LIMIT} s"
        except EOFError:
            self.process.join()
            outcome = f"{RAW}: the process ended with exit code {self.process.exitcode}"
        return self._ended({"model": "", "static cache": False, "methods": {outcome: list(METHODS)}})

    def _ended(self, found: Found) -> Found:
        self.process.kill()
        self.process.join()
        return found


def sweep(names: Sequence[str], jobs: int) -> Iterator[tuple[str, Found]]:
    """What each class does, as it is found, each in a process of its own: it may crash or hang."""
    torch.set_num_threads(1)  # before anything is forked
    measure("LlamaForCausalLM", ["dense"])  # what the first `generate` imports and sets up is there for all
    waiting, running = deque(names), dict[Connection, Job]()
    while waiting or running:
        while waiting and len(running) < jobs:
            pipe, job = _start(waiting.popleft())
            running[pipe] = job
        ready = wait(list(running), timeout=1)
        for pipe in [pipe for pipe, job in running.items() if pipe in ready or time.monotonic() > job.deadline]:
            job = running.pop(pipe)
            yield job.name, job.found(pipe)


def _start(name: str) -> tuple[Connection, Job]:
    context = multiprocessing.get_context("fork")  # what is imported is there at once
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, name), daemon=True)
    process.start()
    sender.close()
    return receiver, Job(name, process, time.monotonic() + LIMIT)


def _send(pipe: Connection, name: str) -> None:
    with open(os.devnull, "w") as nothing:  # classes print and warn
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    pipe.send(measure(name))


# --- the page --------------------------------------------------------------------------------------------------------

FAULTS = (WRONG, RAW, LATE, UNTRUE)
SYMBOLS = {SPARSE: "●", DENSE: "○", REFUSED: "□", **dict.fromkeys(FAULTS, "✗")}

PAGE = """# Families

Every causal class of Transformers {transformers} with every method. This page is measured, not written: `make families`
builds a tiny random model of each class by rules about the names of config fields, and runs each method on it through
`generate`; [families.json](families.json) has every answer. There are two prompts of {length} tokens, one padded by
{padding} on the left, and {new} tokens of answer. An answer counts only if the logits are right, to a relative RMS of
{tolerance}:

- of settings that leave keys out, those of the model's own eager attention under the masks of the very plans that ran;
- of settings that keep everything, those of the unpatched model, also for one prompt alone, on a static cache if the
  unpatched class answers with one as it does without;
- after all patches are undone, those of before, bit for bit.

{totals}

The table:

- ● sparse; the methods are {methods}
- ○ right, and dense in every call for the reason in the note
- □ refused when the model is patched, for the reason in the note
- ✗ a fault: wrong logits, an exception that is not ours, a refusal in the middle of `generate` or one that says what is
  not true of the model

A number says how many of a kind, where they differ.

{table}

{notes}

## No tiny model

{missing}

torch {torch}, transformers {transformers}, on a CPU, in float32. What is sparse by kind of layer, in forwards by hand
and compiled: [models.md](models.md).
"""


def status_of(found: Found) -> str:
    """A class in a word: its worst fault, else "refused" if no method runs, else "right"; or "not shrunk"."""
    if "not shrunk" in found:
        return "not shrunk"
    outcomes = [_head(outcome) for outcome in found["methods"]]
    faults = [fault for fault in FAULTS if fault in outcomes]
    if faults:
        return faults[0]
    return REFUSED if set(outcomes) == {REFUSED} else "right"


def _head(outcome: str) -> str:
    return outcome.partition(":")[0]


def totals_of(families: dict[str, Found]) -> dict[str, int]:
    """How many classes there are of each status."""
    statuses = [status_of(found) for found in families.values()]
    counted = ("right", REFUSED, "not shrunk", *FAULTS)
    return {"tried": len(statuses), **{status: statuses.count(status) for status in counted}}


def said_totals(totals: dict[str, int]) -> str:
    """The totals in a line."""
    return (
        f"Classes tried: {totals['tried']}. Right: {totals['right']}. Refused with the reason: {totals[REFUSED]}. "
        f"No tiny model: {totals['not shrunk']}. Wrong: {totals[WRONG]}. Exceptions that are not ours: {totals[RAW]}. "
        f"Refused late: {totals[LATE]}. Refused with an untrue reason: {totals[UNTRUE]}."
    )


def page(result: dict[str, Any]) -> str:
    """The Markdown page of what `families.json` holds."""
    families = result["families"]
    notes: list[str] = []
    kinds = {kind: of for kind, of in KINDS.items() if kind != "dense"}
    lines = [f"| class | tiny model | {' | '.join(kinds)} |", f"|---|---|{'---|' * len(kinds)}"]
    for name, found in families.items():
        if "methods" in found:
            cells = [_cell(name, found["methods"], methods, notes) for methods in kinds.values()]
            lines.append(f"| {name} | {found['model']} | {' | '.join(cells)} |")
    missing = [f"- {name}: {found['not shrunk']}" for name, found in families.items() if "not shrunk" in found]
    return PAGE.format(
        table="\n".join(lines),
        notes="\n".join(f"{i}. {note}" for i, note in enumerate(notes, 1)),
        missing="\n".join(missing),
        totals=said_totals(result["totals"]),
        methods="; ".join(f"{kind} {', '.join(f'`{method}`' for method in of)}" for kind, of in kinds.items()),
        **{"length": LENGTH, "padding": PADDING, "new": NEW, "tolerance": TOLERANCE},
        **result["versions"],
    )


def _cell(name: str, outcomes: dict[str, list[str]], methods: Sequence[str], notes: list[str]) -> str:
    """A symbol for each outcome of a kind's methods, how many where they differ, and the numbers of their notes."""
    cells = []
    of_kind = {outcome: [method for method in of if method in methods] for outcome, of in outcomes.items()}
    of_kind = {outcome: of for outcome, of in of_kind.items() if of}
    for outcome, of in of_kind.items():
        cell = SYMBOLS[_head(outcome)] + (f" {len(of)}" if len(of_kind) > 1 else "")
        note = outcome.partition(": ")[2].replace(f"{name}: ", "")
        if note:
            if note not in notes:
                notes.append(note)
            cell += f" <sup>{notes.index(note) + 1}</sup>"
        cells.append(cell)
    return ", ".join(cells)


def used_versions() -> dict[str, str]:
    return {name: versions()[name] for name in ("torch", "transformers")}


def write(families: dict[str, Found]) -> dict[str, int]:
    """Write both files; the totals."""
    ordered = {name: families[name] for name in causal_classes() if name in families}
    result = {"versions": used_versions(), "totals": totals_of(ordered), "families": ordered}
    JSON.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    MARKDOWN.write_text(page(result), encoding="utf-8")
    return totals_of(ordered)


def full_name(name: str) -> str:
    """The class that a name stands for, with or without its ForCausalLM."""
    known = causal_classes()
    for found in (name, f"{name}ForCausalLM", f"{name}LMHeadModel"):
        if found in known:
            return found
    near = difflib.get_close_matches(f"{name}ForCausalLM", known, 3)
    raise SystemExit(f"{name}: no causal class of this Transformers; near: {', '.join(near) or 'none'}")


def main(arguments: list[str]) -> None:
    """Measure every class, or the classes of these names, print a line for each, and write."""
    parser = argparse.ArgumentParser(description="Every causal class of Transformers with every method.")
    parser.add_argument("families", nargs="*", help="names of classes, with or without ForCausalLM; none for all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    options = parser.parse_args(arguments)
    names = [full_name(name) for name in options.families]
    kept: dict[str, Found] = {}
    if names:
        before: Any = json.loads(JSON.read_text(encoding="utf-8")) if JSON.exists() else {"versions": used_versions()}
        if before["versions"]["transformers"] != used_versions()["transformers"]:
            raise SystemExit(
                f"{JSON.name} is of Transformers {before['versions']['transformers']}; measure every class"
            )
        kept = before.get("families", {})
    started = time.monotonic()
    for name, found in sweep(names or list(causal_classes()), options.jobs):
        kept[name] = found
        print(f"{status_of(found):10} {name}: {said(found)}", flush=True)
    totals = write(kept)
    print(f"{said_totals(totals)} {time.monotonic() - started:.0f} s")
    if any(totals[fault] for fault in FAULTS):
        raise SystemExit("there are faults; they are marked in docs/families.md")


def said(found: Found) -> str:
    """What was found, in a line."""
    if "not shrunk" in found:
        return str(found["not shrunk"])
    return "; ".join(f"{len(methods)} {outcome}" for outcome, methods in found["methods"].items())


if __name__ == "__main__":
    main(sys.argv[1:])
