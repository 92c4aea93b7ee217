"""A method on one model: the plain object that plans.

The settings (`methods.base.settings`) are what a YAML file says. `settings.bind(shape)` gives the object that the hook
asks: it knows the model, has read the files that the settings name, and tells what it can do by its attributes.
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from sparse_patch.call import AttentionCall, Slot, causal_pairs
from sparse_patch.plans import BlockGrid, BlockPlan, Dense, PagePlan, Plan, Window
from sparse_patch.tensor_parallel import HeadShard

if TYPE_CHECKING:
    from pydantic import BaseModel

Spans = tuple[tuple[int, ...], tuple[Window, ...]]  # sinks and windows, see `SpanPlan`


class Retention(Protocol):
    """What each KV head of a layer keeps, if that is known before a token is: the other keys may be forgotten."""

    def spans_of(self, shard: HeadShard, layer: int, length: int, kv_heads: int) -> Spans:
        """The sink and the window of each of the `kv_heads` KV heads that a process has of a layer.

        Args:
            shard: which of the layer's heads they are.
            layer: the layer.
            length: tokens of prompt and answer together.
            kv_heads: KV heads of the process.

        Returns:
            Sinks and windows, as Python ints (no device sync); a window is None if its head keeps everything.
        """
        ...


class BoundMethod(ABC):
    """A method on one model.

    Attributes:
        settings: the settings, with what they leave open taken from the model: for the report.
        keeps_state: whether `remember` maintains tensors beside the keys, in `call.kv_state`.
        correct_every: tokens after which what was decoded sparsely is computed once more, densely; None for never.
        retention: what a cache has to keep; None if it has to keep every key.
    """

    settings: "BaseModel"
    keeps_state: bool = False
    correct_every: int | None = None
    retention: Retention | None = None

    @abstractmethod
    def plan(self, call: AttentionCall) -> Plan:
        """Decide which keys each query of the call reads, without a host sync."""

    def remember(self, call: AttentionCall) -> None:
        """Bring `call.kv_state` up to date with the keys of a call, of prefill or of decode, before it is planned."""
        return None

    def select(self, call: AttentionCall, logits: torch.Tensor, lse: torch.Tensor) -> None:
        """Choose for the layers that follow, after a plan with `wants_logits` was executed.

        Args:
            call: the call.
            logits: float32 `[B, Hq, capacity]`, of the last query: scaled, softcapped, by position within the row
                (`kv_start[b]` is 0). What lies at the row's length or behind it has no meaning.
            lse: float32 `[B, Hq]`, natural logarithm, of the same query.
        """
        raise NotImplementedError(f"{type(self).__name__} asks for logits and has no select")

    def role(self, layer: int) -> str:
        """What a layer that uses the method does, in a word or two; empty if all layers do the same."""
        return ""

    def remark(self) -> str:
        """What a report should say about the settings beside its numbers, as one line; empty for nothing."""
        return ""


class Selection(NamedTuple):
    """What a prefill method selects, on a grid.

    Attributes:
        blocks: the key blocks that each query block of each head reads, bool `[B, Hq, NQ, N]`. Blocks outside the
            causal triangle are dropped.
        columns: single keys that every query block after them reads beside its blocks, int64 `[B, Hq, C]`, as positions
            within the row; a negative entry is none. None for no columns.
        decided_pairs: see `BlockPlan`, int64 `[B, Hq]`.
        pv_threshold: see `BlockPlan`.
        is_causal: whether `blocks` has nothing outside the causal triangle, which saves a copy of it.
    """

    blocks: torch.Tensor
    columns: torch.Tensor | None = None
    decided_pairs: torch.Tensor | None = None
    pv_threshold: float | None = None
    is_causal: bool = False

    def plan(self, grid: BlockGrid, dense_tokens: int) -> BlockPlan:
        """The plan. Rows of at most `dense_tokens` tokens read everything."""
        blocks, decided, is_causal = self.blocks, self.decided_pairs, self.is_causal
        if grid.padded:  # else the rows are as long as the call, which is not short
            short_rows = (grid.lengths <= dense_tokens)[:, None]
            blocks, is_causal = blocks | short_rows[..., None, None], False
            if decided is not None:
                causal = causal_pairs(grid.q_start, grid.kv_length, grid.row_starts)[:, None]
                decided = torch.where(short_rows, causal, decided)
        plan = BlockPlan.from_blocks(blocks, grid, self.columns, is_causal=is_causal)
        if decided is None and self.pv_threshold is None:
            return plan
        return replace(plan, decided_pairs=decided, pv_threshold=self.pv_threshold)


class SelectsBlocks(Protocol):
    """What the template of prefill asks: a `PrefillMethod`, or what knows more of the model than it does."""

    block_size: int

    def why_dense(self, call: AttentionCall) -> Dense | None: ...

    def dense_tokens(self, call: AttentionCall) -> int: ...

    def select(self, call: AttentionCall, grid: BlockGrid) -> Selection | BlockPlan: ...


class BoundPrefill(BoundMethod):
    """The template of prefill: dense answers, the grid, the short rows of a batch, the plan.

    Attributes:
        chooser: what selects.
    """

    def __init__(self, settings: Any, chooser: SelectsBlocks | None = None) -> None:
        self.settings, self.chooser = settings, chooser or settings

    def plan(self, call: AttentionCall) -> Plan:
        """See `BoundMethod.plan`."""
        if dense := self.chooser.why_dense(call):
            return dense
        grid = BlockGrid.of(call, self.chooser.block_size)
        selection = self.chooser.select(call, grid)
        if isinstance(selection, BlockPlan):
            return selection
        return selection.plan(grid, self.chooser.dense_tokens(call))


class ChoosesPages(Protocol):
    """What the template of decode asks: a `DecodeMethod`."""

    keeps_state: bool
    correct_every: int | None

    def why_dense(self, call: AttentionCall) -> Dense | None: ...

    def statistics(self, call: AttentionCall) -> Any: ...

    def choose(self, call: AttentionCall, statistics: Any) -> PagePlan: ...


class BoundDecode(BoundMethod):
    """The template of decode: the state beside the keys, dense answers, the choice."""

    _STATISTICS: Slot[Any] = Slot("statistics of a layer's keys")

    def __init__(self, settings: Any) -> None:
        self.settings, self.chooser = settings, settings
        self.keeps_state, self.correct_every = self.chooser.keeps_state, self.chooser.correct_every

    chooser: ChoosesPages

    def remember(self, call: AttentionCall) -> None:
        """See `BoundMethod.remember`; what it gives is kept for the plan of the same call."""
        if self.keeps_state and call.kv_state is not None:
            self._STATISTICS.put(call.forward_state, self.chooser.statistics(call), call.layer)

    def plan(self, call: AttentionCall) -> Plan:
        """See `BoundMethod.plan`."""
        if dense := self.chooser.why_dense(call):
            return dense
        statistics = self._STATISTICS.pop(call.forward_state, call.layer)
        if statistics is None:
            statistics = self.chooser.statistics(call)
        return self.chooser.choose(call, statistics)
