"""What runs sparsely on which model: measured on tiny random models, not written down.

    python docs/support_table.py                 # everything, into docs/support.json and docs/models.md
    python docs/support_table.py gemma3 llama4   # these families again; what there is of the others is kept
    python docs/support_table.py quest           # this method again, on every family

Every family runs every method: a prompt longer than the method's `min_length` and a few tokens, in forwards by hand
and through `generate`, with the cache that it makes, with a static one, and with a static one whose decode step is
compiled. What the page says is read from the sparsity report of each run, which counts only if its logits are right;
the page says what they are compared with.
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, CompileConfig, DynamicCache, PreTrainedModel
from transformers.masking_utils import eager_mask
from transformers.utils import logging

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import families  # noqa: E402
from method_table import DECODE_METHODS, PREFILL_METHODS, SPAN_METHODS, TOKEN_METHODS, write_plans  # noqa: E402

from sparse_patch import SparsePatchError, capture_plans, patched, sparsity_report  # noqa: E402
from sparse_patch.call import PHASES, Phase  # noqa: E402
from sparse_patch.discovery import dispatch_scope  # noqa: E402
from sparse_patch.errors import said_in_one_line  # noqa: E402
from sparse_patch.methods.base import registry  # noqa: E402
from sparse_patch.methods.layer_roles import LayeredMethod  # noqa: E402
from sparse_patch.model_shape import ModelShape, attention_kind, layer_with_keys  # noqa: E402
from sparse_patch.patching import versions  # noqa: E402
from sparse_patch.plans import Dense, Plan  # noqa: E402
from sparse_patch.report import PhaseReport, SparsityReport  # noqa: E402
from sparse_patch.writing import write_file  # noqa: E402

Settings = dict[str, Any]
Inputs = dict[str, torch.Tensor]
Plans = dict[int, list[Plan]]  # of each layer, call by call

CASES = (*PREFILL_METHODS, *DECODE_METHODS, *TOKEN_METHODS, *SPAN_METHODS)
WAYS = ("forward", "generate", "static", "compiled")
LENGTH, NEW = 200, 4
TOLERANCE = 5e-4  # of logits of size 1, in float32
DESIGN = {"dense: sliding-window layer", "dense: chunked layer"}
NOT_ATTENTION = "no causal self-attention"
AS_STATIC = "as uncompiled"
NOT_COMPILED = "not compiled by Transformers"
WRONG = "WRONG"
ORACLE = "support_oracle"
JSON, MARKDOWN = ROOT / "docs" / "support.json", ROOT / "docs" / "models.md"


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        models: what stands for these models.
        build: a tiny random model of their architecture.
        inputs: what it reads; None for tokens.
    """

    models: str
    build: Callable[[], PreTrainedModel]
    inputs: Callable[[PreTrainedModel, int], Inputs] | None = None


FAMILIES: dict[str, Family] = {
    "llama": Family("Llama 2, 3, 3.1, 3.2, 3.3", families.llama),
    "llama4": Family("Llama 4", families.llama4),
    "mistral": Family("Mistral 0.1 (sliding window)", families.mistral),
    "mistral_full": Family("Mistral 0.2 and later", families.mistral_full),
    "qwen2": Family("Qwen2, Qwen2.5", families.qwen2),
    "qwen3": Family("Qwen3", families.qwen3),
    "qwen3_moe": Family("Qwen3-MoE", families.qwen3_moe),
    "qwen3_next": Family("Qwen3-Next", families.qwen3_next),
    "qwen3_5": Family("Qwen3.5", families.qwen3_5),
    "gemma": Family("Gemma 1 (head_dim 256)", families.gemma),
    "gemma2": Family("Gemma 2 (softcap 50)", families.gemma2),
    "gemma3": Family("Gemma 3 (head_dim 256)", partial(families.gemma3, periods=2)),
    "gemma3n": Family("Gemma 3n (scale 1)", families.gemma3n),
    "gemma4": Family("Gemma 4 (scale 1, head_dim 256 and 512)", partial(families.gemma4, 256, 512)),
    "minicpm": Family("MiniCPM 1, 2, 4, 4.1, by `load_minicpm`", families.minicpm),
    "minicpm3": Family("MiniCPM3 (MLA)", families.minicpm3),
    "phi3": Family("Phi-3, Phi-4-mini", families.phi3),
    "granite": Family("Granite 3", families.granite),
    "gpt_oss": Family("gpt-oss", families.gpt_oss),
    "mllama": Family("Llama 3.2 Vision, with an image", families.mllama, families.image_inputs),
    "qwen2_5_vl": Family("Qwen2.5-VL, with an image", families.qwen2_5_vl, families.image_inputs),
    "qwen3_vl": Family("Qwen3-VL, with an image", families.qwen3_vl, families.image_inputs),
    "qwen3_5_vl": Family("Qwen3.5, with an image", families.qwen3_5_vl, families.image_inputs),
    "gemma3_vlm": Family("Gemma 3, with an image", partial(families.vlm, periods=2), families.image_inputs),
    "gemma4_vlm": Family("Gemma 4, with an image", families.gemma4_vlm, families.image_inputs),
}


def measure(
    name: str, compiled: Iterable[str] | None = None, device: str = "cpu", methods: Iterable[str] = ()
) -> dict[str, Any]:
    """What one family does: the layers of each kind, and by method, kind of layer, phase and way what was computed.

    Args:
        name: of `FAMILIES`.
        compiled: methods whose decode step is compiled as well; None for all that decode.
        device: where the model runs.
        methods: these alone; none for all.
    """
    torch.manual_seed(0)
    family = FAMILIES[name]
    model = family.build()
    ids = torch.randint(3, 90, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids} if family.inputs is None else family.inputs(model, LENGTH)
    probe = Probe(model.to(device), {key: tensor.to(device) for key, tensor in inputs.items()})
    names = [method for method in ("dense", *probe.settings) if not methods or method in methods]
    found = {method: probe.method(method, compiled is None or method in compiled) for method in names}
    return {"models": family.models, "layers": probe.kinds(), "methods": found}


def settings_of(model: PreTrainedModel) -> dict[str, tuple[Settings, Settings]]:
    """By method, settings that select a part of `LENGTH` tokens, and settings that keep everything."""
    text = model.config.get_text_config(decoder=True)
    full = [layer for layer in range(text.num_hidden_layers) if attention_kind(text, layer) == "full"]
    chosen: dict[str, tuple[Settings, Settings]] = {}
    for case in CASES:
        name = case.small["method"]
        layers: Any = "all"
        if issubclass(registry()[name], LayeredMethod):
            layers = {"full": [], "select": full[:1]}
        # Logits of random queries and keys lie in the tens, of a single KV head not one half streams, and of blocks of
        # 64 tokens there are four.
        changes = {
            "sale": {"tau": 1e12},
            "duoattention": {"sparsity": 1.0},
            "infllmv2": {"topk": 2, "init_blocks": 0},
        }.get(name, {})
        chosen.setdefault(name, ({**case.small, **changes, "layers": layers}, {**case.full, "layers": layers}))
    return chosen


class Probe:
    """One model, and what its methods do."""

    def __init__(self, model: PreTrainedModel, inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs
        self.text = model.config.get_text_config(decoder=True)
        self.settings = settings_of(model)
        self.dense = {way: self._run(way) for way in WAYS[:3]}

    def kinds(self) -> dict[str, list[int]]:
        """The layers of each kind."""
        kinds: dict[str, list[int]] = {}
        for layer in range(self.text.num_hidden_layers):
            kinds.setdefault(self.kind(layer), []).append(layer)
        return kinds

    def kind(self, layer: int) -> str:
        kind = attention_kind(self.text, layer)
        return kind if layer_with_keys(self.text, layer) == layer else f"{kind}, shared keys"

    def method(self, name: str, compiled: bool) -> dict[str, dict[Phase, dict[str, str]]]:
        """By kind of layer, phase and way what a method computes."""
        phases = registry()[name].phases
        found: dict[str, dict[Phase, dict[str, str]]] = {
            kind: {phase: {} for phase in PHASES if phase in phases} for kind in self.kinds()
        }
        ways = [way for way in WAYS if way != "compiled" or (compiled and "decode" in phases)]
        static: torch.Tensor | None = None
        for way in ways:
            answers, logits = self._answers(name, way, static)
            static = logits if way == "static" else static
            for kind, by_phase in found.items():
                for phase, by_way in by_phase.items():
                    if (phase, way) == ("prefill", "compiled"):
                        continue  # `generate` compiles no prefill
                    answer = answers if isinstance(answers, str) else answers[kind, phase]
                    by_way[way] = by_way["static"] if answer == AS_STATIC else answer
        return found

    def _answers(
        self, name: str, way: str, static: torch.Tensor | None
    ) -> tuple[str | dict[tuple[str, Phase], str], torch.Tensor | None]:
        """What a method does in one way, by kind and phase, or one answer for all of them; and its logits.

        What is compiled is compared with `static`; everything else, with settings that keep everything, with dense; and
        forwards by hand with the model's own attention under the masks of the plans.
        """
        with self._configs(name) as (small, full):
            try:
                logits, report, plans = self._patched(small, way)
                compared = logits if way == "compiled" else self._patched(full, way)[0]
            except SparsePatchError as error:
                return f"refused: {str(error).removeprefix('dict: ')}", None
        expected = static if way == "compiled" else self.dense[way]
        assert expected is not None
        distance = (compared - expected).abs().max().item()
        if way == "forward":
            distance = max(distance, (logits - self._by_masks(plans)).abs().max().item())
        if not distance <= TOLERANCE or not bool(logits.isfinite().all()):
            return f"{WRONG}: {distance:.2g} from what it should be", logits
        if way == "compiled":
            compiled = all(layer.compiled for layer in report.layers)
            return (AS_STATIC if compiled else NOT_COMPILED), logits
        return {
            (kind, phase): self._answer(report, layers, phase)
            for kind, layers in self.kinds().items()
            for phase in PHASES
        }, logits

    def _patched(self, config: Settings, way: str) -> tuple[torch.Tensor, SparsityReport, Plans]:
        """Logits, report and the plans of every layer."""
        with patched(self.model, config), capture_plans(self.model) as plans:
            logits = self._run(way)
            return (
                logits,
                sparsity_report(self.model),
                {layer: [plan for _, plan in made] for layer, made in plans.items()},
            )

    def _by_masks(self, plans: Plans) -> torch.Tensor:
        """The logits of the same forwards of the model as it is, with its eager attention under the masks of plans."""
        left = {layer: iter(of_layer) for layer, of_layer in plans.items()}

        def attend(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **kwargs: Any) -> Any:
            plan, scope = next(left.get(module.layer_idx, iter(())), None), dispatch_scope(module)
            if plan is not None and not isinstance(plan, Dense):
                mask = torch.zeros((), device=q.device).where(plan.mask(), torch.finfo(q.dtype).min)
            assert scope is not None
            return scope["eager_attention_forward"](module, q, k, v, mask, **kwargs)

        before = self.text._attn_implementation
        AttentionInterface.register(ORACLE, attend)
        AttentionMaskInterface.register(ORACLE, eager_mask)
        self.text._attn_implementation = ORACLE
        try:
            return self._run("forward")
        finally:
            self.text._attn_implementation = before

    def _answer(self, report: SparsityReport, layers: list[int], phase: Phase) -> str:
        """What the layers of a kind did in a phase."""
        seen = [_status(layer.phase(phase)) for layer in report.layers if layer.layer in layers]
        distinct = set(seen) - {""}
        if "sparse" in distinct:
            distinct.discard("every key")  # the layers that choose for the others
        return "; ".join(sorted(distinct, key=lambda status: (status != "sparse", status))) or NOT_ATTENTION

    @contextmanager
    def _configs(self, name: str) -> Iterator[tuple[Settings, Settings]]:
        if name == "dense":
            yield {"both": {"method": "dense"}}, {"both": {"method": "dense"}}
            return
        phases = registry()[name].phases
        place = phases[0] if len(phases) == 1 else "both"
        with TemporaryDirectory() as folder:
            shape = ModelShape.of(self.text, self.text.num_hidden_layers)
            write_plans(Path(folder), shape)
            configs = []
            for settings in self.settings[name]:
                files = {"calibration": f"{folder}/{settings['calibration']}"} if "calibration" in settings else {}
                configs.append({place: {**settings, **files}, "on_unsupported": "silent"})
            yield configs[0], configs[1]

    @torch.no_grad()
    def _run(self, way: str) -> torch.Tensor:
        """The logits of one way to run the model."""
        if way == "forward":
            cache = DynamicCache(config=self.model.config)
            prompt = self.model(**self.inputs, past_key_values=cache).logits
            tokens = torch.arange(5, 5 + NEW, device=prompt.device)[None].split(1, 1)
            answer = [self.model(input_ids=token, past_key_values=cache).logits for token in tokens]
            return torch.cat([prompt, *answer], 1)
        options: dict[str, Any] = {"disable_compile": True} if way != "compiled" else {"compile_config": _compile()}
        if way != "generate":
            options["cache_implementation"] = "static"
        torch._dynamo.reset()
        result: Any = self.model.generate(  # type: ignore[operator]
            **self.inputs,
            **options,
            attention_mask=torch.ones_like(self.inputs["input_ids"]),
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(result.logits)


def _compile() -> CompileConfig:
    """One graph without breaks, on a CPU too."""
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    return config


def _status(phase: PhaseReport) -> str:
    """What one layer did: "sparse", "every key" by a plan, dense or fallback with the reason; "" without a call."""
    reasons = [f"dense: {reason}" for reason in phase.dense] + [f"fallback: {reason}" for reason in phase.fallbacks]
    if phase.sparse_calls:
        assert phase.density is not None
        reasons.append("sparse" if phase.density < 1 else "every key")
    return "; ".join(sorted(reasons))


def compact(measured: dict[str, Any]) -> dict[str, Any]:
    """What `measure` returned with one answer where all ways give it."""
    methods = {
        method: {
            kind: {phase: _one(by_way) for phase, by_way in by_phase.items()} for kind, by_phase in by_kind.items()
        }
        for method, by_kind in measured["methods"].items()
    }
    return {**measured, "methods": methods}


def _one(by_way: dict[str, str]) -> str | dict[str, str]:
    answers = set(by_way.values())
    return answers.pop() if len(answers) == 1 else by_way


# --- the page --------------------------------------------------------------------------------------------------------

SYMBOLS = {"sparse": "●", "design": "○", "none": "", "other": "✗"}
IN = {
    "forward": "in forwards by hand",
    "generate": "in `generate`",
    "static": "on a static cache",
    "compiled": "compiled",
}

PAGE = """# Models

What runs sparsely on which model, by kind of layer. This page is measured, not written: `make support` runs each method
on a tiny random model of every family and reads the sparsity reports; [support.json](support.json) has every answer. A
prompt of {length} tokens and {new} of answer go through forwards by hand with a `DynamicCache`, and through `generate`
with the cache that it makes, with a static cache, and with a static cache whose decode step is compiled
(`fullgraph=True` and backend `eager`, which shows that it is one graph). An answer counts only if the logits are right:

- by hand, those of the model's own eager attention under the masks of the very plans that ran;
- of the same method with settings that keep everything, those of dense attention;
- of a compiled step, those of the same step uncompiled.

The table:

- ● sparse, in every way to run it
- ○ dense by the model's design: the layer has a window or chunks of its own
- ✗ dense, or refused, for the reason in the note
- empty: no causal self-attention (linear attention, cross-attention to an image), left as it is

{table}

{notes}

Of methods whose layers choose for others (`tidaldecode`, `delta`, `lessismore`), ● is those others. `generate` compiles
decode steps only, never prefill; in a `torch.compile` of yours prefill is sparse on a GPU, and with spans everywhere.
Layers with shared keys read those of an earlier layer; when `generate` reads a prompt, those of Gemma 4 compute only
its last token. On a GPU the kernels that multiply whole queries and keys serve a head_dim of up to 256; wider layers
(512 in Gemma 4) make and run the same plans in PyTorch.

torch {torch}, transformers {transformers}, on a CPU, in float32.
"""


def page(result: dict[str, Any]) -> str:
    """The Markdown page of what `support.json` holds."""
    families = list(result["families"].values())
    of_all = set.intersection(*(set(family["methods"]) for family in families)) - {"dense"}
    methods = [method for method in families[0]["methods"] if method in of_all]
    notes: list[str] = []
    lines = [
        f"| models | layers | {' | '.join(f'`{method}`' for method in methods)} |",
        f"|---|---|{'---|' * len(methods)}",
    ]
    for family in families:
        for i, kind in enumerate(family["layers"]):
            cells = [_cell(family["methods"][method][kind], notes) for method in methods]
            lines.append(f"| {family['models'] if i == 0 else ''} | {kind} | {' | '.join(cells)} |")
    numbered = "\n".join(f"{i}. {note}" for i, note in enumerate(notes, 1))
    return PAGE.format(table="\n".join(lines), notes=numbered, length=LENGTH, new=NEW, **result["versions"])


def _cell(by_phase: dict[str, str | dict[str, str]], notes: list[str]) -> str:
    """A symbol, and the number of the note that it needs."""
    answers = answers_of(by_phase)
    ran = answers - {NOT_COMPILED}
    symbol = (
        "none" if ran == {NOT_ATTENTION} else "design" if ran <= DESIGN else "sparse" if "sparse" in ran else "other"
    )
    if answers <= DESIGN or answers in ({"sparse"}, {NOT_ATTENTION}):
        return SYMBOLS[symbol]
    said = {phase: _said(found) for phase, found in by_phase.items()}
    alike = len(set(said.values())) == 1
    note = said.popitem()[1] if alike else "; ".join(f"{phase}: {found}" for phase, found in said.items())
    if note not in notes:
        notes.append(note)
    return f"{SYMBOLS[symbol]} <sup>{notes.index(note) + 1}</sup>"


def answers_of(by_phase: dict[str, str | dict[str, str]]) -> set[str]:
    """All that a method answers in layers of a kind."""
    return {answer for found in by_phase.values() for answer in ([found] if isinstance(found, str) else found.values())}


def _said(found: str | dict[str, str]) -> str:
    if isinstance(found, str):
        return found
    ways: dict[str, list[str]] = {}
    for way, answer in found.items():
        if answer != NOT_COMPILED:
            ways.setdefault(answer, []).append(IN[way])
    said = list(ways) if len(ways) == 1 else [f"{answer} {' and '.join(where)}" for answer, where in ways.items()]
    return ", ".join([*said, NOT_COMPILED] if NOT_COMPILED in found.values() else said)


def main(names: list[str]) -> None:
    """Measure everything, or the families and the methods of these names, and write."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    if unknown := set(names) - set(FAMILIES) - set(registry()):
        raise SystemExit(f"{', '.join(sorted(unknown))}: no family and no method; families are {', '.join(FAMILIES)}")
    found = json.loads(JSON.read_text(encoding="utf-8"))["families"] if names else {}
    methods = [name for name in names if name in registry()]
    for name in [name for name in names if name in FAMILIES] or FAMILIES:
        kept = found[name]["methods"] if methods and name in found else {}
        found[name] = compact(measure(name, methods=methods))
        found[name]["methods"] = _in_order({**kept, **found[name]["methods"]})
        print(f"measured {name}", file=sys.stderr, flush=True)
        write({name: found[name] for name in FAMILIES if name in found})


def _in_order(methods: dict[str, Any]) -> dict[str, Any]:
    order = dict.fromkeys(("dense", *(case.small["method"] for case in CASES)))
    return {method: methods[method] for method in order if method in methods}


def write(found: dict[str, Any]) -> None:
    """Write both files; a wrong answer is not written."""
    text = json.dumps({"versions": used_versions(), "families": found}, indent=1, ensure_ascii=False)
    if WRONG in text:
        raise SystemExit(f"wrong answers, they are not written:\n{text}")
    write_file(JSON, text + "\n")
    write_file(MARKDOWN, page(json.loads(text)))


def used_versions() -> dict[str, str]:
    return {name: versions()[name] for name in ("torch", "transformers")}


if __name__ == "__main__":
    with said_in_one_line():
        main(sys.argv[1:])
