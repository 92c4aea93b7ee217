"""The measurements of prompts: what each layer would have found in the lists of every earlier layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from sparse_patch.call import AttentionCall, apply_softcap
from sparse_patch.errors import TaskError
from sparse_patch.integration.observe import observed
from sparse_patch.models.loading import check_context
from sparse_patch.workbench.generation import encode
from sparse_patch.workbench.journal import Journal
from sparse_patch.workbench.progress import Step
from sparse_patch.workbench.tasks import TASKS, Sample

PROMPTS = ("copy", "recite", "niah_multikey_1", "niah_multikey_2", "niah_multivalue")  # all look up far tokens
POSITIONS = 16  # tokens of each answer whose attention is measured
FIRST, LAST = 4, 64  # tokens that are not far: most attention lies on them, and every list has them
MATRICES = ("mass_per_head", "mass_shared", "overlap_per_head", "overlap_shared")

Matrix = list[list[float]]  # [selecting layer][layer]; 0 if the layer comes before the selecting layer


@dataclass(frozen=True)
class Measured:
    """The measurements of one prompt. Matrices are over the layers that can run sparse attention, not over all layers.

    Attributes:
        sample: index of the prompt.
        task: task of the prompt.
        layers: indices of the layers that can run sparse attention.
        far: share of each layer's attention that lies on far tokens.
        mass_per_head: share of the attention to far tokens on the lists of a layer, for lists per query head.
        mass_shared: the same for one list of all heads.
        overlap_per_head: share of the best keys that the lists contain, for lists per query head.
        overlap_shared: the same for one list of all heads.
        jumps: 1 - cosine of the attention of each layer and the one before it; 0 for the first layer.
    """

    sample: int
    task: str
    layers: list[int]
    far: list[float]
    mass_per_head: Matrix
    mass_shared: Matrix
    overlap_per_head: Matrix
    overlap_shared: Matrix
    jumps: list[float]

    @property
    def key(self) -> int:
        return self.sample


def samples_of(tokenizer: Any, length: int, number: int, seed: int) -> list[Sample]:
    """Make the prompts to measure, of the tasks in turn; raise TaskError if the length is too short."""
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
    """Measure every prompt, in order. Prompts that the journal already has are not read again.

    Args:
        model: an unpatched model; it is unpatched afterwards too.
        tokenizer: the model's.
        samples: the prompts with their answers.
        budget: keys of a list.
        journal: the measurements of each prompt are added to it.
        progress: called with a description before each prompt that is read.

    Raises:
        PatchError: the model is already patched, or cannot be patched.
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
    """The lists of the layers seen so far, and what each later layer finds in them. No N x N matrix is ever made.

    Attributes:
        positions: positions of the queries to measure, int64 `[n]`.
        budget: keys per list.
        layers: indices of the layers seen so far.
        far: the share of far tokens in the attention of each seen layer.
        found: for each seen layer, a list with (mass per head, mass shared, overlap per head, overlap shared) in the
            lists of every layer up to itself.
        jumps: the jump of each seen layer.
    """

    def __init__(self, positions: torch.Tensor, budget: int) -> None:
        self.positions, self.budget = positions, budget
        self.layers: list[int] = []
        self.far: list[float] = []
        self.found: list[list[list[float]]] = []
        self.jumps: list[float] = []
        self._per_head: list[torch.Tensor] = []  # int32 [Hq, n, budget] of each layer
        self._shared: list[torch.Tensor] = []  # int32 [1, n, budget]
        self._before: torch.Tensor | None = None

    def see(self, call: AttentionCall) -> None:
        positions = self.positions.to(call.q.device)
        probability = attention_of(call, positions)
        together = probability.amax(0, keepdim=True)
        far = far_part(probability, positions)
        own = far.topk(self.budget, -1).indices
        self._per_head.append(own.int())
        self._shared.append(far.amax(0, keepdim=True).topk(self.budget, -1).indices.int())
        best = torch.zeros_like(far).scatter_(-1, own, 1 / self.budget)
        lists = zip(self._per_head, self._shared, strict=True)
        self.found.append([[_held(x, keys) for x in (far, best) for keys in pair] for pair in lists])
        self.far.append(float(far.sum(-1).mean()))
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
            for kind, name in enumerate(MATRICES)
        }
        far = [round(share, 5) for share in self.far]
        return Measured(number, task, self.layers, far, **matrices, jumps=[round(jump, 5) for jump in self.jumps])


def attention_of(call: AttentionCall, positions: torch.Tensor) -> torch.Tensor:
    """The attention probabilities of some queries of a one-row call over all keys, float32 `[Hq, n, Skv]`."""
    q = call.q[0][:, positions].float().unflatten(0, (call.k.shape[1], call.group_size))
    logits = torch.einsum("hgnd,hsd->hgns", q, call.k[0].float()).flatten(0, 1) * call.scale
    later = torch.arange(call.kv_length, device=q.device) > (call.q_start + positions)[:, None]
    return apply_softcap(logits, call.softcap).masked_fill_(later, -torch.inf).softmax(-1)


def far_part(probability: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The attention `[Hq, n, Skv]` of queries at these positions with 0 for the first and the last tokens."""
    key = torch.arange(probability.shape[-1], device=probability.device)
    return probability.masked_fill((key < FIRST) | (key > (positions - LAST)[:, None]), 0)


def _held(weights: torch.Tensor, keys: torch.Tensor) -> float:
    """The share of the weight that is on the listed keys, of all heads and queries together."""
    on_keys = weights.gather(-1, keys.long().expand(len(weights), -1, -1)).sum()
    return float(on_keys / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny))
