"""The tiny model of one class, and the outcome of every method on it."""

import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from benchmarks.families.claims import what_is_untrue
from benchmarks.families.generating import (
    ALONE,
    PADDED,
    STATIC,
    Way,
    distance,
    in_one_line,
    logits_of,
    model_that_generates,
)
from benchmarks.families.settings import Settings, settings_of
from sparse_patch import SparsePatchError, capture_plans, patched, sparsity_report
from sparse_patch.plans import Dense
from sparse_patch.report import SparsityReport

TOLERANCE = 1e-4  # relative RMS
ORACLE = "sweep_oracle"
SPARSE, DENSE, REFUSED, WRONG, RAW, LATE, UNTRUE = "sparse", "dense", "refused", "WRONG", "RAW", "LATE", "UNTRUE"


class Probe:
    """The tiny model of one class, and the outcome of every method on it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model, self.padded = model_that_generates(name)
        self.text = self.model.config.get_text_config(decoder=True)
        self.alone, self.alone_way = self._alone()

    def _alone(self) -> tuple[torch.Tensor, Way]:
        """The unpatched logits of one prompt, on a static cache if the model answers the same with one."""
        alone = logits_of(self.model, ALONE)
        try:
            static = logits_of(self.model, STATIC)
        except Exception:  # a class may refuse static caches in its own way
            return alone, ALONE
        return (static, STATIC) if distance(static, alone) <= TOLERANCE else (alone, ALONE)

    def method(self, name: str) -> str:
        """The outcome of one method, with the reason if there is one."""
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
        """For a `with` block: the model runs its own eager attention, under the plans' masks in calls with a plan."""
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
        """None if the model computes the same as before all patches; else how far off it is."""
        off = distance(logits_of(self.model, PADDED), self.padded)
        return None if off == 0 else f"{WRONG}: {off:.2g} off after unpatching"


def eager_attention_of(module: torch.nn.Module) -> Callable[..., Any]:
    scope: dict[str, Any] = inspect.unwrap(module.forward).__globals__
    function: Callable[..., Any] = scope["eager_attention_forward"]
    return function


def _where(error: BaseException) -> str:
    """An exception, and the place in the package that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/sparse_patch/" in frame.filename]
    places = [f"{Path(frame.filename).name}:{frame.name}" for frame in (ours[-1:] + frames[-1:])]
    return f"{in_one_line(error)} at {' in '.join(dict.fromkeys(reversed(places)))}"


def what_ran(report: SparsityReport) -> str:
    """ "sparse", or "dense" with the reasons of all calls."""
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
