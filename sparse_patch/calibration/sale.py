"""The search for SALE's thresholds: for each head, the largest threshold that keeps its output within an error.

The search follows the paper's public code (arXiv 2505.24179; BirdChristopher/SALE). A head begins at a threshold of
0.008, which is halved until the output changes by less than `error`: the L1 norm of the change over the head's
dimensions, mean over the queries of a prompt. The heads of a small model tolerate much larger thresholds, so `highest`
sets the first one. A threshold that reaches 1e-4 becomes 0, which is dense. Prompts run one after another, and each
begins with the thresholds of the one before, so more prompts never raise a threshold. The model itself stays dense: a
layer sees the same input whatever was found in earlier layers.

In the public code, estimates and window differ between the search and the use. Here a search runs the method itself,
with the numerics, the window and the tiles that it will be used with. While some heads are still searched, finished
heads get an infinite threshold, which makes them cheap.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

from sparse_patch.artefacts.thresholds import write_thresholds
from sparse_patch.calibration.base import Calibration
from sparse_patch.calibration.prompts import generated_prompts, text_prompts
from sparse_patch.call import AttentionCall
from sparse_patch.config import load_config
from sparse_patch.errors import TaskError
from sparse_patch.integration.observe import observed
from sparse_patch.methods.sale import Sale
from sparse_patch.model_shape import ModelShape
from sparse_patch.ops.attention.block_sparse import attend
from sparse_patch.plans import BlockPlan, Dense
from sparse_patch.workbench.generation import prefill
from sparse_patch.workbench.journal import Journal
from sparse_patch.workbench.progress import Step

HIGHEST = 0.008  # first threshold of every head in the public code
LOWEST = 1e-4  # at or below which a head becomes dense


@dataclass(frozen=True)
class LayerThresholds:
    """The result of the search for one layer on one prompt.

    Attributes:
        prompt: index of the prompt.
        layer: index of the layer.
        tau: threshold of each query head after this prompt.
        error: error of each head at its threshold; 0 for a dense head.
        density: computed share of the causal triangle of each head at these thresholds.
    """

    prompt: int
    layer: int
    tau: list[float]
    error: list[float]
    density: list[float]

    @property
    def key(self) -> tuple[int, int]:
        return self.prompt, self.layer


def search(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    error: float,
    journal: Journal[LayerThresholds],
    progress: Step = lambda _: None,
    method: Sale | None = None,
    highest: float = HIGHEST,
) -> list[LayerThresholds]:
    """Find the thresholds of every layer that can run sparse attention, after the last prompt, in order.

    Records that the journal already has are not measured again.

    Args:
        model: an unpatched model; it is unpatched afterwards too.
        prompts: tokens of each prompt.
        error: the change of a head's output that is allowed; see the module.
        journal: the result of each layer and prompt is added to it.
        progress: called with a description before each layer that is measured.
        method: the method to search with; default settings by default. Its thresholds are not used.
        highest: the threshold that every head begins with.

    Raises:
        PatchError: the model is already patched, or cannot be patched.
        TaskError: a prompt is too short, or no layer of the model can run sparse attention.
    """
    method = method or Sale()
    for number, tokens in enumerate(prompts):

        def see(call: AttentionCall, number: int = number) -> None:
            if (number, call.layer) not in journal.records:
                progress(f"prompt {number + 1}, layer {call.layer}")
                before = journal.records.get((number - 1, call.layer))
                start = before.tau if before else [highest] * call.q.shape[1]
                journal.add(_found(call, method, error, number, start))

        with observed(model, see):
            prefill(model, tokens)
    last = [journal.records[key] for key in sorted(journal.records) if key[0] == len(prompts) - 1]
    if not last:
        raise TaskError("--model: no layer of this model can run sparse attention, see `sparse-patch show`")
    return last


def _found(call: AttentionCall, method: Sale, error: float, number: int, start: Sequence[float]) -> LayerThresholds:
    """Halve the thresholds of the heads whose error is too large, until no error is too large."""
    dense = attend(call, BlockPlan.every(call, method.block_size))[0].float()
    tau = torch.tensor(start, dtype=torch.float32, device=call.q.device)
    open_heads = tau > 0
    errors, densities = torch.zeros_like(tau), torch.ones_like(tau)
    while bool(open_heads.any()):
        plan = method.plan_at(call, tau.masked_fill(~open_heads, torch.inf))
        if isinstance(plan, Dense):
            raise TaskError(f"--lengths: {call.kv_length} tokens are too few for a search: {plan.reason}")
        change = (attend(call, plan)[0].float() - dense).abs().sum(-1).mean((0, 2))
        within = open_heads & (change < error)
        errors, densities = errors.where(~within, change), densities.where(~within, plan.density().mean(0))
        open_heads = open_heads & ~within
        tau = tau.where(~open_heads, tau / 2)
        tau = tau.where(~(open_heads & (tau <= LOWEST)), 0.0)
        open_heads = open_heads & (tau > 0)
    return LayerThresholds(number, call.layer, tau.tolist(), errors.tolist(), densities.tolist())


def thresholds(found: Sequence[LayerThresholds], num_layers: int, num_heads: int) -> torch.Tensor:
    """The thresholds as a tensor, float32 `[num_layers, num_heads]`; 0 for layers that stay dense."""
    tau = torch.zeros(num_layers, num_heads)
    for layer in found:
        tau[layer.layer, : len(layer.tau)] = torch.tensor(layer.tau)
    return tau


def table(found: Sequence[LayerThresholds], error: float) -> Table:
    """A table with one line per layer: thresholds, dense heads, largest error, and density on the last prompt."""
    result = Table(title=f"thresholds of SALE at an error of {error:g}", title_justify="left")
    for column in ("layer", "tau", "dense heads", "largest error", "density"):
        result.add_column(column, justify="right")
    for layer in found:
        sparse = [tau for tau in layer.tau if tau > 0]
        result.add_row(
            str(layer.layer),
            f"{min(sparse):.5f}-{max(sparse):.5f}" if sparse else "",
            str(len(layer.tau) - len(sparse)),
            f"{max(layer.error):.3f}",
            f"{fmean(layer.density):.2f}",
        )
    return result


@dataclass(frozen=True)
class SaleCalibration(Calibration[list[LayerThresholds]]):
    """The search for thresholds, on long prompts.

    Attributes:
        numerics: numerics of the estimates, as in the method.
        window: window in tokens, as in the method.
        block_size: block size in tokens, as in the method. Use the thresholds with this block size or a larger one.
        error: the change of a head's output that is allowed; see the module.
        highest: the threshold that every head begins with.
        lengths: tokens of the prompts.
        samples: number of prompts per length.
        tasks: offline tasks of the prompts, in turn.
        seed: determines everything random.
        text: file to take prompts from, instead of the tasks.
    """

    name = "sale"
    record = LayerThresholds
    makes = "thresholds"
    used_by = "prefill.calibration"

    numerics: str = "int8"
    window: int = 128
    block_size: int = 128
    error: float = 0.4
    highest: float = HIGHEST
    lengths: tuple[int, ...] = (8192,)
    samples: int = 5
    tasks: tuple[str, ...] = ("kv_retrieval",)
    seed: int = 0
    text: str | None = None

    @cached_property
    def method(self) -> Sale:
        """The method to search with; raise ConfigError if one of its settings is not valid."""
        settings = {"numerics": self.numerics, "window": self.window, "block_size": self.block_size}
        method = load_config({"prefill": {"method": "sale", "min_length": 0, **settings}}).prefill
        assert isinstance(method, Sale)
        return method

    def check(self) -> None:
        _ = self.method

    def steps(self, shape: ModelShape) -> int:
        return shape.num_layers * len(self.lengths) * self.samples

    def search(
        self, model: PreTrainedModel, tokenizer: Any, journal: Journal[Any], progress: Step
    ) -> list[LayerThresholds]:
        if self.text is None:
            prompts = generated_prompts(model, tokenizer, self.tasks, self.lengths, self.samples, self.seed)
        else:
            prompts = text_prompts(model, tokenizer, Path(self.text), self.lengths, self.samples)
        return search(model, prompts, self.error, journal, progress, self.method, self.highest)

    def table(self, found: list[LayerThresholds]) -> list[Table]:
        return [table(found, self.error)]

    def write(self, path: Path, found: list[LayerThresholds], shape: ModelShape, model_id: str) -> None:
        write_thresholds(path, thresholds(found, shape.num_layers, shape.num_heads), self.header(shape, model_id))
