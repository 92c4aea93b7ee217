"""One tiny model, and what every method does on it in every way to run the model."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from method_table import DECODE_METHODS, PREFILL_METHODS, SPAN_METHODS, TOKEN_METHODS, write_plans
from transformers import AttentionInterface, AttentionMaskInterface, CompileConfig, DynamicCache, PreTrainedModel
from transformers.masking_utils import eager_mask

from benchmarks.support.rows import FAMILIES, Inputs
from sparse_patch import SparsePatchError, capture_plans, patched, sparsity_report
from sparse_patch.call import PHASES, Phase
from sparse_patch.integration.discovery import dispatch_scope
from sparse_patch.methods.base.layered import LayeredMethod
from sparse_patch.methods.base.registry import registry
from sparse_patch.model_shape import ModelShape, attention_kind, layer_with_keys
from sparse_patch.plans import Dense, Plan
from sparse_patch.report import PhaseReport, SparsityReport

Settings = dict[str, Any]
Plans = dict[int, list[Plan]]  # layer -> the plans of its calls, in order
CASES = (*PREFILL_METHODS, *DECODE_METHODS, *TOKEN_METHODS, *SPAN_METHODS)
WAYS = ("forward", "generate", "static", "compiled")
LENGTH, NEW = 200, 4
TOLERANCE = 5e-4  # of logits of size 1, in float32
NOT_ATTENTION = "no causal self-attention"
AS_STATIC = "as uncompiled"
NOT_COMPILED = "not compiled by Transformers"
WRONG = "WRONG"
ORACLE = "support_oracle"


def measure(
    name: str, compiled: Iterable[str] | None = None, device: str = "cpu", methods: Iterable[str] = ()
) -> dict[str, Any]:
    """Measure one family: the layers of each kind, and what was computed by method, kind of layer, phase and way.

    Args:
        name: a name in `FAMILIES`.
        compiled: methods whose decode step is also compiled; None for all methods that decode.
        device: device of the model.
        methods: the only methods to measure; empty for all methods.
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
    """Method -> settings that select some of `LENGTH` tokens, and settings that keep all of them."""
    text = model.config.get_text_config(decoder=True)
    full = [layer for layer in range(text.num_hidden_layers) if attention_kind(text, layer) == "full"]
    chosen: dict[str, tuple[Settings, Settings]] = {}
    for case in CASES:
        name = case.small["method"]
        which: Any = {"layers": "all"}
        if issubclass(registry()[name], LayeredMethod):
            which = {"roles": {"full": [], "select": full[:1]}}
        # Needed because logits of random queries and keys are in the tens, half of a single KV head cannot stream, and
        # there are only four blocks of 64 tokens.
        changes = {
            "sale": {"tau": 1e12},
            "duoattention": {"sparsity": 1.0},
            "infllmv2": {"topk": 2, "init_blocks": 0},
        }.get(name, {})
        chosen.setdefault(name, ({**case.small, **changes, **which}, {**case.full, **which}))
    return chosen


class Probe:
    """One model, and what every method does on it."""

    def __init__(self, model: PreTrainedModel, inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs
        self.text = model.config.get_text_config(decoder=True)
        self.settings = settings_of(model)
        self.dense = {way: self._run(way) for way in WAYS[:3]}

    def kinds(self) -> dict[str, list[int]]:
        """Kind of layer -> indices of its layers."""
        kinds: dict[str, list[int]] = {}
        for layer in range(self.text.num_hidden_layers):
            kinds.setdefault(self.kind(layer), []).append(layer)
        return kinds

    def kind(self, layer: int) -> str:
        kind = attention_kind(self.text, layer)
        return kind if layer_with_keys(self.text, layer) == layer else f"{kind}, shared keys"

    def method(self, name: str, compiled: bool) -> dict[str, dict[Phase, dict[str, str]]]:
        """Kind of layer -> phase -> way -> what a method computes."""
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
                        continue  # `generate` does not compile prefill
                    answer = answers if isinstance(answers, str) else answers[kind, phase]
                    by_way[way] = by_way["static"] if answer == AS_STATIC else answer
        return found

    def _answers(
        self, name: str, way: str, static: torch.Tensor | None
    ) -> tuple[str | dict[tuple[str, Phase], str], torch.Tensor | None]:
        """What a method does in one way, by kind and phase or as one answer for all of them; and its logits.

        A compiled run is compared with `static`. Every other run is repeated with settings that keep everything and
        compared with dense attention. Forwards by hand are also compared with the model's own attention under the masks
        of the plans.
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
        """Run a configuration: the logits, the report, and the plans of every layer."""
        with patched(self.model, config), capture_plans(self.model) as plans:
            logits = self._run(way)
            return (
                logits,
                sparsity_report(self.model),
                {layer: [plan for _, plan in made] for layer, made in plans.items()},
            )

    def _by_masks(self, plans: Plans) -> torch.Tensor:
        """The logits of the same forwards by the unpatched model, with eager attention under the masks of the plans."""
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
        """What the layers of one kind did in a phase."""
        seen = [_status(layer.phase(phase)) for layer in report.layers if layer.layer in layers]
        distinct = set(seen) - {""}
        if "sparse" in distinct:
            distinct.discard("every key")  # these layers choose for the others
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
        """Run the model in one way and return its logits."""
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
    """A compile config that requires one graph without breaks, on a CPU too."""
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    return config


def _status(phase: PhaseReport) -> str:
    """What one layer did: "sparse", "every key" (by a plan), dense or fallback with the reason; "" without calls."""
    reasons = [f"dense: {reason}" for reason in phase.dense] + [f"fallback: {reason}" for reason in phase.fallbacks]
    if phase.sparse_calls:
        assert phase.density is not None
        reasons.append("sparse" if phase.density < 1 else "every key")
    return "; ".join(sorted(reasons))
