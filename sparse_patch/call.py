"""What one attention call looks like to a method and to an op."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import torch

from sparse_patch.kernels.inference_mode import OrdinaryState
from sparse_patch.tensor_parallel import ALL_HEADS, HeadShard

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")


T = TypeVar("T")
ForwardState = dict[tuple[str, Hashable], Any]  # a plain dict, because torch.compile can create one; see `Slot`


class Slot(Generic[T]):
    """A place for values of one type in the state of a forward, by which layers pass values on to each other.

    The module that fills a slot defines the slot, once.

    Attributes:
        name: distinguishes the slot from the other slots.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def get(self, state: ForwardState, key: Hashable = None) -> T | None:
        """Return the value; None if there is none. With a `key` a slot holds several values, such as one per layer."""
        value: T | None = state.get((self.name, key))
        return value

    def put(self, state: ForwardState, value: T, key: Hashable = None) -> None:
        """Fill the slot."""
        state[self.name, key] = value

    def pop(self, state: ForwardState, key: Hashable = None) -> T | None:
        """Remove the value and return it; None if there is none."""
        value: T | None = state.pop((self.name, key), None)
        return value


class TensorSlot:
    """A place for the tensors of one owner in a `KVState`. The module that fills the slot defines it, once.

    Attributes:
        name: distinguishes the slot from the other slots.
        in_steps: whether decode steps use the tensors; else they may be replaced between two steps.
    """

    def __init__(self, name: str, in_steps: bool = True) -> None:
        self.name, self.in_steps = name, in_steps


@dataclass
class KVState(OrdinaryState):
    """The tensors of one layer of one cache. The cache keeps them in step with its keys.

    Attributes:
        tensors: by slot and name, each with the batch as its first dimension.
        moving: slots whose tensors decode steps do not use.
        covered: number of tokens that the tensors cover, if the host knows it (a growing cache); 0 if none.
        corrected: number of tokens that cache correction need not read again, see `integration.kv_correction`.
        at_rest: whether the running forward reads everything, because it corrects sparsely decoded tokens.
    """

    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    moving: set[str] = field(default_factory=set)
    covered: int = 0
    corrected: int = 0
    at_rest: bool = False

    def of(self, slot: TensorSlot) -> dict[str, torch.Tensor]:
        """The tensors of one owner, by name. Changing the mapping changes the state."""
        if not slot.in_steps:
            self.moving.add(slot.name)
        return self.tensors.setdefault(slot.name, {})

    def places(self) -> list[int]:
        """Where the tensors lie that decode steps use."""
        return [x.data_ptr() for name, owned in self.tensors.items() if name not in self.moving for x in owned.values()]

    def clear(self) -> None:
        """Drop everything; the method starts again from the keys."""
        self.tensors.clear()
        self.covered = 0

    def change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Reorder, repeat or select the rows of the batch."""
        for tensors in self.tensors.values():
            tensors.update({name: change(tensor) for name, tensor in tensors.items()})

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(each.numel() * each.element_size() for tensors in self.tensors.values() for each in tensors.values())


@dataclass(frozen=True)
class AttentionCall:
    """One causal attention call, after RoPE and after the KV cache was updated.

    Positions are absolute: query `i` of the call stands at `q_start + i`, key `j` at `j`, and the last query is at the
    last key (`q_start + Sq == Skv`), so the causal rule is `j <= q_start + i`. Row `b` of a left-padded batch begins at
    key `kv_start[b]`; the keys before it are padding and are never read.

    Attributes:
        q: `[B, Hq, Sq, D]`, any strides.
        k: `[B, Hkv, Skv, D]`, not repeated over a GQA group, cropped to the keys that are valid.
        v: `[B, Hkv, Skv, Dv]`; `Dv` may differ from `D`.
        scale: factor on `q @ k.T`, as the model passes it (not always `D ** -0.5`).
        layer: index of the layer, from 0.
        phase: "prefill" or "decode".
        q_start: absolute position of the first query.
        kv_start: int64 `[B]` on the device of `q`, or None if no row is padded.
        softcap: logits become `softcap * tanh(logits / softcap)` after scaling; None without softcap.
        kv_end: int64 `[]` on the device of `q`: how many keys of `k` and `v` are valid, in a decode call with a static
            cache. Then `k` and `v` are whole buffers, keys after the valid ones are never read, and `q_start` has no
            meaning. None if all keys are valid.
        known_end: the value of `kv_end`, if the host knows it too: in the steps of `integration.graphs`.
        forward_state: what methods pass on from layer to layer, in slots; one object per forward.
        kv_state: what a decode method keeps with the keys of this layer from step to step; None if the cache has no
            room for it.
        max_length: tokens of prompt and answer together that the cache is made for; None if the cache does not say.
        split: which of the layer's heads `q`, `k` and `v` have, if tensor parallelism splits them; else None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    layer: int
    phase: Phase
    q_start: int = 0
    kv_start: torch.Tensor | None = None
    softcap: float | None = None
    kv_end: torch.Tensor | None = None
    known_end: int | None = None
    forward_state: ForwardState = field(default_factory=dict)
    kv_state: KVState | None = None
    max_length: int | None = None
    split: HeadShard | None = None  # torch.compile (2.11) cannot create a default of our own classes

    @property
    def shard(self) -> HeadShard:
        """Which of the layer's heads the call has."""
        return ALL_HEADS if self.split is None else self.split

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def kv_length(self) -> int:
        """Number of keys of the longest row, including padding; for a static cache, the size of its buffer."""
        return self.k.shape[2]

    @property
    def length(self) -> int | None:
        """Number of valid keys if the host knows it; None if only the device does."""
        return self.kv_length if self.kv_end is None else self.known_end

    @property
    def decisive_length(self) -> int:
        """The number of keys by which a method decides on the host: the valid ones, or else the size of the buffer."""
        return self.kv_length if self.length is None else self.length

    def row_starts(self) -> torch.Tensor:
        """First real key of each row, int64 `[B]`."""
        if self.kv_start is not None:
            return self.kv_start
        return torch.zeros(self.q.shape[0], dtype=torch.int64, device=self.q.device)

    def end(self) -> torch.Tensor:
        """Number of valid keys, int64 `[]`, on the device."""
        if self.kv_end is not None:
            return self.kv_end
        return torch.full((), self.kv_length, dtype=torch.int64, device=self.q.device)

    def lengths(self) -> torch.Tensor:
        """Real keys of each row, int64 `[B]`."""
        if self.kv_start is not None:
            return self.end() - self.kv_start
        if self.kv_end is not None:
            return self.kv_end.expand(self.q.shape[0])
        return torch.full((self.q.shape[0],), self.kv_length, dtype=torch.int64, device=self.q.device)


def causal_pairs(q_start: int | torch.Tensor, kv_length: int | torch.Tensor, row_starts: torch.Tensor) -> torch.Tensor:
    """Number of (query, key) pairs of the causal triangle in each row of a call, int64 `[B]`."""
    first_query = (q_start - row_starts).clamp(min=0)
    length = kv_length - row_starts
    return (length * (length + 1) - first_query * (first_query + 1)) // 2


def apply_softcap(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """`softcap * tanh(logits / softcap)`, in place; the unchanged logits if `softcap` is None."""
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)
