"""The search for MInference's head patterns: of candidates of similar cost, the one that changes a head's output least.

The search uses one prompt, of key-value retrieval as in the paper (Alg. 1 and Table 7). Every head of every layer runs
with each candidate. The criterion is the paper's: the error of the attention output against dense attention, over all
queries. (The public code ranks by attention mass of the late queries, and saves A-shape and block-sparse winners as
vertical-slash.) The model itself stays dense, so a layer sees the same input whatever is chosen in earlier layers.

The candidates have the paper's sizes. The paper matched them, at prompts of 30k tokens, to the cost of 1k sink and 4k
window tokens. For shorter prompts they shrink in proportion. Block-sparse is no candidate, because files have no size
for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

from sparse_patch.artefacts.patterns import Pattern, write_patterns
from sparse_patch.calibration.base import Calibration
from sparse_patch.call import AttentionCall
from sparse_patch.errors import TaskError
from sparse_patch.integration.observe import observed
from sparse_patch.methods.minference import FORCED_COLUMNS, FORCED_DISTANCES, MInference
from sparse_patch.model_shape import ModelShape
from sparse_patch.models.loading import check_context
from sparse_patch.ops.attention.block_sparse import attend
from sparse_patch.plans import BlockPlan, Dense
from sparse_patch.workbench.generation import encode, prefill
from sparse_patch.workbench.journal import Journal
from sparse_patch.workbench.progress import Step
from sparse_patch.workbench.tasks import TASKS

PAPER_LENGTH = 30_000
PAPER_CANDIDATES = (
    Pattern("vertical_and_slash", 30, 2048),
    Pattern("vertical_and_slash", 100, 1800),
    Pattern("vertical_and_slash", 500, 1500),
    Pattern("vertical_and_slash", 3000, 200),
    Pattern("stream_llm", 1024, 4096),
)


@dataclass(frozen=True)
class LayerPatterns:
    """The result of the search for one layer.

    Attributes:
        layer: index of the layer.
        heads: for each head [pattern, columns, diagonals, score]; the score is the relative error of the output.
        densities: computed share of the causal triangle of each candidate, mean over heads.
    """

    layer: int
    heads: list[tuple[str, int, int, float]]
    densities: list[float]

    @property
    def key(self) -> int:
        return self.layer


def candidates(length: int) -> tuple[Pattern, ...]:
    """The distinct patterns to choose from, for prompts of `length` tokens."""
    scale = min(1.0, length / PAPER_LENGTH)
    return tuple(dict.fromkeys(_scaled(pattern, scale) for pattern in PAPER_CANDIDATES))


def _scaled(pattern: Pattern, scale: float) -> Pattern:
    """Scale a pattern, but keep at least the verticals and slashes that the method always takes."""
    lines = pattern.kind == "vertical_and_slash"
    return Pattern(
        pattern.kind,
        max(round(pattern.columns * scale), FORCED_COLUMNS if lines else 1),
        max(round(pattern.diagonals * scale), FORCED_DISTANCES if lines else 1),
    )


def search(
    model: PreTrainedModel,
    tokens: Sequence[int],
    journal: Journal[LayerPatterns],
    progress: Step = lambda _: None,
    method: MInference | None = None,
) -> list[LayerPatterns]:
    """Find the patterns of every layer, in order. Layers that the journal already has are not measured again.

    Args:
        model: an unpatched model; it is unpatched afterwards too.
        tokens: tokens of the prompt.
        journal: the result of each layer is added to it.
        progress: called with a description before each layer that is measured.
        method: the method whose block size the search uses; by default one with default settings.

    Raises:
        PatchError: the model is already patched, or cannot be patched.
        TaskError: the prompt is too short, or no layer of the model can run sparse attention.
    """
    method = method or MInference()
    choices = candidates(len(tokens))

    def see(call: AttentionCall) -> None:
        if call.layer not in journal.records:
            progress(f"layer {call.layer}")
            journal.add(_best(call, choices, method))

    with observed(model, see):
        prefill(model, tokens)
    if not journal.records:
        raise TaskError("--model: no layer of this model can run sparse attention, see `sparse-patch show`")
    return [journal.records[layer] for layer in sorted(journal.records)]


def _best(call: AttentionCall, choices: Sequence[Pattern], method: MInference) -> LayerPatterns:
    """The pattern of smallest error for each head; the first one if errors are equal."""
    dense = attend(call, BlockPlan.every(call, method.block_size))[0].float()
    errors, densities = [], []
    for choice in choices:
        plan = method.plan_by(call, (choice,) * call.q.shape[1])
        if isinstance(plan, Dense):
            raise TaskError(
                f"--length: {call.kv_length} tokens are too few for a search: {choice.kind} {choice.columns}, "
                f"{choice.diagonals} reads everything; ask for 1024 or more"
            )
        output = attend(call, plan)[0].float()
        errors.append((output - dense).square().sum((0, 2, 3)) / dense.square().sum((0, 2, 3)))
        densities.append(float(plan.density().mean()))
    smallest, chosen = torch.stack(errors).sqrt().min(0)
    return LayerPatterns(
        call.layer,
        [(*choices[number], round(error, 6)) for number, error in zip(chosen.tolist(), smallest.tolist(), strict=True)],
        densities,
    )


def by_layer(found: Sequence[LayerPatterns], num_layers: int) -> list[dict[int, tuple[str, int, int, float]]]:
    """The heads of every layer, for the file; empty for layers that stay dense."""
    heads = {layer.layer: dict(enumerate(layer.heads)) for layer in found}
    return [heads.get(layer, {}) for layer in range(num_layers)]


def table(found: Sequence[LayerPatterns], length: int) -> Table:
    """A table of how many heads chose each candidate, their mean error, and the candidate's density."""
    result = Table("pattern", "columns", "diagonals", "heads", "error", "density", title=f"{length} tokens")
    for number, choice in enumerate(candidates(length)):
        errors = [entry[3] for layer in found for entry in layer.heads if tuple(entry[:3]) == choice]
        density = fmean(layer.densities[number] for layer in found)
        error = f"{fmean(errors):.4f}" if errors else ""
        sizes = str(choice.columns), str(choice.diagonals)
        result.add_row(choice.kind, *sizes, str(len(errors)), error, f"{density:.2f}")
    return result


@dataclass(frozen=True)
class MInferenceCalibration(Calibration[list[LayerPatterns]]):
    """The search for head patterns, on one prompt of key-value retrieval.

    Attributes:
        length: tokens of the prompt.
        seed: determines keys and values.
    """

    name = "minference"
    record = LayerPatterns
    makes = "patterns"
    used_by = "prefill.calibration"

    length: int = PAPER_LENGTH
    seed: int = 0

    def steps(self, shape: ModelShape) -> int:
        return shape.num_layers

    def search(
        self, model: PreTrainedModel, tokenizer: Any, journal: Journal[Any], progress: Step
    ) -> list[LayerPatterns]:
        check_context(model, self.length, 0, "--length")
        sample = TASKS["kv_retrieval"].sample(tokenizer, self.length, self.seed)
        return search(model, encode(tokenizer, sample.prompt, sample.answer)[0], journal, progress)

    def table(self, found: list[LayerPatterns]) -> list[Table]:
        return [table(found, self.length)]

    def write(self, path: Path, found: list[LayerPatterns], shape: ModelShape, model_id: str) -> None:
        write_patterns(path, self.header(shape, model_id), by_layer(found, shape.num_layers))
