"""The search for selection layers: where decode should choose keys, so that the layers behind find theirs among them.

TidalDecode, LessIsMore and DELTA run the first layers and a few others densely. Those choose keys, and the layers that
follow read these alone until the next one chooses. Which layers choose well is a property of the model: in Llama-3 and
in needle-llama everything hangs on one layer, and the one before it loses everything.

A model reads a few long prompts with their answers in one dense forward. For some tokens of the answer, the queries of
decode, the attention of every layer over all keys before them says what each layer would have found in the lists of
every layer before it:

- mass: the share of its attention that lies on the `budget` keys which the other layer likes best; for lists per query
  head (TidalDecode, arXiv 2410.05076) and for one list of all heads, by the maximum of the probability over heads
  (DELTA, arXiv 2510.09883);
- overlap: the share of its own best keys among them, TidalDecode's measure;
- jump: 1 - cosine of the attention of neighbouring layers, the maximum over heads: DELTA's measure.

The first `full` layers stay dense, the next one selects, and of the sets of `--select` layers after it that one is
chosen which leaves the most mass to the sparse layers, mean over them and over both kinds of lists: a file serves
methods with either. Mass, not overlap: a key without weight is no loss. On needle-llama the mean finds its layer 5 at
2k, 4k and 8k tokens; the worst sparse layer says the same still louder, and so do overlap and the jump.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from rich import box
from rich.table import Table
from transformers import PreTrainedModel

from sparse_patch.call import AttentionCall, apply_softcap
from sparse_patch.errors import TaskError
from sparse_patch.evaluation.generation import check_context, encode
from sparse_patch.evaluation.journal import Journal
from sparse_patch.evaluation.tasks import TASKS, Sample
from sparse_patch.observe import observed
from sparse_patch.progress import Step
from sparse_patch.writing import write_file

PROMPTS = ("recite", "niah_multikey_1", "niah_multikey_2", "niah_multivalue")
POSITIONS = 16  # tokens of each answer whose attention is looked at
FULL = 2  # first layers that stay dense and select nothing
_MOST_SETS = 20_000  # that are tried one by one; beyond that layers are chosen one after another

_MATRICES = ("mass_per_head", "mass_shared", "overlap_per_head", "overlap_shared")

Matrix = list[list[float]]  # [selecting layer][layer]; meaningful where the second is not before the first


@dataclass(frozen=True)
class Measured:
    """What one prompt showed. Matrices count the layers that can run sparse attention, not all layers.

    Attributes:
        sample: number of the prompt.
        task: its task.
        layers: indices of the layers that can run sparse attention.
        mass_per_head: attention mass that the lists of a layer hold, for lists per query head.
        mass_shared: the same for one list of all heads.
        overlap_per_head: share of the best keys that the lists hold, for lists per query head.
        overlap_shared: the same for one list of all heads.
        jumps: 1 - cosine of the attention of a layer and the one before it; 0 for the first.
    """

    sample: int
    task: str
    layers: list[int]
    mass_per_head: Matrix
    mass_shared: Matrix
    overlap_per_head: Matrix
    overlap_shared: Matrix
    jumps: list[float]

    @property
    def key(self) -> int:
        return self.sample


@dataclass(frozen=True)
class Curves:
    """The means of all prompts; attributes as those of `Measured`."""

    layers: list[int]
    mass_per_head: torch.Tensor
    mass_shared: torch.Tensor
    overlap_per_head: torch.Tensor
    overlap_shared: torch.Tensor
    jumps: list[float]

    @classmethod
    def of(cls, measured: Sequence[Measured]) -> "Curves":
        def mean(name: str) -> torch.Tensor:
            return torch.tensor([getattr(one, name) for one in measured], dtype=torch.float64).mean(0)

        return cls(measured[0].layers, **{name: mean(name) for name in _MATRICES}, jumps=mean("jumps").tolist())

    @property
    def mass(self) -> torch.Tensor:
        """Of both kinds of lists, `[selecting layer, layer]`."""
        return (self.mass_per_head + self.mass_shared) / 2


@dataclass(frozen=True)
class Choice:
    """Layers, by their index in the model.

    Attributes:
        full: dense, and select nothing.
        select: dense, and select for the sparse layers behind them.
        mass: what their lists hold of the attention of a sparse layer, mean over these.
        worst: the same of the sparse layer that finds least.
    """

    full: list[int]
    select: list[int]
    mass: float
    worst: float


def samples_of(tokenizer: Any, length: int, number: int, seed: int) -> list[Sample]:
    """The prompts to look at: the tasks in turn; raises TaskError for a length that is too short."""
    turns = [divmod(sample, len(PROMPTS)) for sample in range(number)]
    return [TASKS[PROMPTS[task]].sample(tokenizer, length, seed, index) for index, task in turns]


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    tokenizer: Any,
    samples: Sequence[Sample],
    budget: int,
    journal: Journal[Measured],
    progress: Step = lambda _: None,
) -> list[Measured]:
    """What every prompt shows, in order; prompts that the journal has are not read again.

    Args:
        model: not patched; it is left so.
        tokenizer: the model's.
        samples: the prompts, with their answers.
        budget: keys of a list.
        journal: gets each prompt as it was read.
        progress: called with a description before each prompt that is read.

    Raises:
        PatchError: the model is patched already, or cannot be.
        TaskError: a prompt does not fit the model's context or is no longer than the budget, or no layer of the model
            can run sparse attention.
    """
    asked = [encode(tokenizer, sample.prompt, sample.answer) for sample in samples]
    for sample, (tokens, answer) in zip(samples, asked, strict=True):
        check_context(model, len(tokens), len(answer), "--length")
        if budget >= len(tokens):
            raise TaskError(f"--budget: {budget} tokens are all of a prompt of {sample.length}; ask for fewer")
    for number, (tokens, answer) in enumerate(asked):
        if number not in journal.records:
            progress(f"{samples[number].task}, prompt {number + 1}")
            journal.add(_read(model, tokens, answer, budget, number, samples[number].task))
    return [journal.records[number] for number in range(len(samples))]


def _read(
    model: PreTrainedModel, tokens: Sequence[int], answer: Sequence[int], budget: int, number: int, task: str
) -> Measured:
    spread = torch.linspace(len(tokens), len(tokens) + len(answer) - 1, min(POSITIONS, len(answer)))
    lists = _Lists(spread.round().long(), budget)
    with observed(model, lists.see):
        ids = torch.tensor([[*tokens, *answer]], device=model.device)
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    if not lists.layers:
        raise TaskError("--model: no layer of this model can run sparse attention, see `sparse-patch show`")
    return lists.measured(number, task)


class _Lists:
    """The lists of the layers seen so far, and what each later layer finds in them. Never N x N, one layer at a time.

    Attributes:
        positions: of the queries to look at, int64 `[n]`.
        budget: keys of a list.
        layers: that were seen.
        found: for each of them a list with (mass per head, mass shared, overlap per head, overlap shared) in the lists
            of every layer up to itself.
        jumps: for each of them.
    """

    def __init__(self, positions: torch.Tensor, budget: int) -> None:
        self.positions, self.budget = positions, budget
        self.layers: list[int] = []
        self.found: list[list[list[float]]] = []
        self.jumps: list[float] = []
        self._per_head: list[torch.Tensor] = []  # int32 [Hq, n, budget] of each layer
        self._shared: list[torch.Tensor] = []  # int32 [1, n, budget]
        self._before: torch.Tensor | None = None

    def see(self, call: AttentionCall) -> None:
        probability = attention_of(call, self.positions.to(call.q.device))
        together = probability.amax(0, keepdim=True)
        own = probability.topk(self.budget, -1).indices
        self._per_head.append(own.int())
        self._shared.append(together.topk(self.budget, -1).indices.int())
        best = torch.zeros_like(probability).scatter_(-1, own, 1 / self.budget)
        lists = zip(self._per_head, self._shared, strict=True)
        self.found.append([[_held(x, keys) for x in (probability, best) for keys in pair] for pair in lists])
        if self._before is None:
            self.jumps.append(0.0)
        else:
            self.jumps.append(1 - float(torch.cosine_similarity(self._before, together, dim=-1).mean()))
        self._before = together
        self.layers.append(call.layer)

    def measured(self, number: int, task: str) -> Measured:
        size = range(len(self.layers))
        matrices = {
            name: [[round(self.found[at][by][kind], 5) if by <= at else 0.0 for at in size] for by in size]
            for kind, name in enumerate(_MATRICES)
        }
        return Measured(number, task, self.layers, **matrices, jumps=[round(jump, 5) for jump in self.jumps])


def attention_of(call: AttentionCall, positions: torch.Tensor) -> torch.Tensor:
    """The attention of some queries of a call of one row over all keys, float32 `[Hq, n, Skv]`."""
    q = call.q[0][:, positions].float().unflatten(0, (call.k.shape[1], call.group_size))
    logits = torch.einsum("hgnd,hsd->hgns", q, call.k[0].float()).flatten(0, 1) * call.scale
    later = torch.arange(call.kv_length, device=q.device) > (call.q_start + positions)[:, None]
    return apply_softcap(logits, call.softcap).masked_fill_(later, -torch.inf).softmax(-1)


def _held(weights: torch.Tensor, keys: torch.Tensor) -> float:
    """What lies on the listed keys, mean over heads and queries."""
    return float(weights.gather(-1, keys.long().expand(len(weights), -1, -1)).sum(-1).mean())


def choose(curves: Curves, reselect: int, full: int = FULL) -> Choice:
    """The first `full` layers dense, the next one selecting, and the best `reselect` layers after it.

    The last layer is no candidate, it would select for none. Layers that cannot run sparse attention count for nothing.

    Raises:
        TaskError: there are not as many layers.
    """
    candidates = _candidates(curves, full)
    check_number(reselect, len(curves.layers), full)
    if comb(len(candidates), reselect) <= _MOST_SETS:
        sets = combinations(candidates, reselect)
        return max((choice_of(curves, full, chosen) for chosen in sets), key=lambda choice: choice.mass)
    best, chosen = choice_of(curves, full, ()), list[int]()
    for _ in range(reselect):
        left = [layer for layer in candidates if layer not in chosen]
        trials = {layer: choice_of(curves, full, sorted([*chosen, layer])) for layer in left}
        chosen.append(max(trials, key=lambda layer: trials[layer].mass))
        best = trials[chosen[-1]]
    return best


def check_number(reselect: int, layers: int, full: int = FULL) -> None:
    """Raise TaskError if so many layers have fewer to choose from than are to be chosen; known before the work."""
    left = max(0, layers - full - 2)
    if reselect > left:
        raise TaskError(f"--select: the model has {left} layers to choose from, not {reselect}")


def choice_of(curves: Curves, full: int, reselect: Sequence[int]) -> Choice:
    """A choice of layers and what the sparse layers find; `reselect` counts the layers of the curves, in order."""
    select = [full, *reselect]
    mass = curves.mass
    found = [
        float(mass[max(chosen for chosen in select if chosen < layer), layer])
        for layer in range(full + 1, len(curves.layers))
        if layer not in select
    ]
    names = curves.layers
    return Choice(names[:full], [names[layer] for layer in select], fmean(found), min(found))


def _candidates(curves: Curves, full: int) -> range:
    number, least = len(curves.layers), full + 2
    if number < least:
        raise TaskError(f"--model: {number} of its layers can run sparse attention; a search needs {least}")
    return range(full + 1, number - 1)


def curve(curves: Curves, full: int = FULL) -> Iterator[dict[str, Any]]:
    """What each layer would be worth as the only re-selecting one, and its jump; plain data, a row for each layer."""
    for layer in _candidates(curves, full):
        choice = choice_of(curves, full, [layer])
        nearest = [full if other < layer else layer for other in range(len(curves.layers))]
        sparse = [other for other in range(full + 1, len(curves.layers)) if other != layer]

        def mean(matrix: torch.Tensor, nearest: list[int] = nearest, sparse: list[int] = sparse) -> float:
            return round(fmean(float(matrix[nearest[other], other]) for other in sparse), 4)

        yield {
            "layer": curves.layers[layer],
            "mass": round(choice.mass, 4),
            "mass_per_head": mean(curves.mass_per_head),
            "mass_shared": mean(curves.mass_shared),
            "worst_layer": round(choice.worst, 4),
            "overlap_per_head": mean(curves.overlap_per_head),
            "overlap_shared": mean(curves.overlap_shared),
            "jump": round(curves.jumps[layer], 4),
        }


def table(curves: Curves, choice: Choice, about: dict[str, Any]) -> Table:
    """The curve: one line for each layer that may select again; the chosen ones are marked."""
    title = f"what sparse layers find with one re-selecting layer: {about['length']} tokens, {about['budget']} kept"
    drawn = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in (
        *("re-selecting layer", "mass", "lists per head", "one list", "worst layer"),
        *("overlap per head", "overlap, one list", "1 - cos", ""),
    ):
        drawn.add_column(column, justify="right")
    for row in curve(curves):
        layer, *values = row.values()
        chosen = "<- chosen" if layer in choice.select else ""
        drawn.add_row(str(layer), *(f"{value:.3f}" for value in values), chosen)
    return drawn


def summary(choice: Choice) -> str:
    """The choice, in one line."""
    return (
        f"full {choice.full}, select {choice.select}: of the attention of a sparse layer their lists hold "
        f"{choice.mass:.3f}, in the worst one {choice.worst:.3f}"
    )


def as_json(
    curves: Curves, choice: Choice, model: dict[str, Any], about: dict[str, Any], measured: Sequence[Measured]
) -> dict[str, Any]:
    """Everything: the choice, the curve, the matrices, and what each prompt showed of the mass."""
    return {
        **as_yaml(curves, choice, model, about),
        "layers": curves.layers,
        **{name: [[round(x, 5) for x in row] for row in getattr(curves, name).tolist()] for name in _MATRICES},
        "jumps": curves.jumps,
        "prompts": {
            f"{one.task} {one.sample // len(PROMPTS)}": [
                {"layer": row["layer"], "mass": row["mass"]} for row in curve(Curves.of([one]))
            ]
            for one in measured
        },
    }


def as_yaml(curves: Curves, choice: Choice, model: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """What the methods read (`model`, `full`, `select`), and under `measured` where it comes from."""
    return {
        "model": model,
        "full": choice.full,
        "select": choice.select,
        "measured": {
            **about,
            "mass": round(choice.mass, 4),
            "worst_layer": round(choice.worst, 4),
            "candidates": list(curve(curves)),
        },
    }


def write_layers(data: dict[str, Any], path: Path) -> None:
    """Write a calibration as YAML, a line for each entry."""

    def lines(mapping: dict[str, Any], indent: str) -> Iterator[str]:
        for key, value in mapping.items():
            if key == "measured":
                yield f"{key}:"
                yield from lines(value, "  ")
            elif key == "candidates":
                yield f"{indent}{key}:"
                yield from (f"{indent}- {_flow(row)}" for row in value)
            else:
                yield f"{indent}{key}: {_flow(value)}"

    text = "# Which layers of a model select keys for decode, by `sparse-patch calibrate layers`.\n"
    write_file(path, text + "\n".join(lines(data, "")) + "\n")


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).split("\n...")[0].strip()


def model_of(model: PreTrainedModel) -> dict[str, Any]:
    """What says whether a calibration is of a model."""
    config = model.config.get_text_config(decoder=True)
    return {
        "model_type": config.model_type,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "hidden_size": config.hidden_size,
    }


def journal_of(path: Path, about: dict[str, Any]) -> Journal[Measured]:
    """The journal beside a file that is to be written."""
    return Journal.beside(path, about, Measured, "--out")
