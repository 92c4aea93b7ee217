"""A method bound to one model: the plain object that plans.

The settings (`methods.base.settings`) are what a YAML file says. `settings.bind(shape)` gives the object that the hook
asks. This object knows the model, has read the files that the settings name, and says by its attributes what it can do.
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch

from sparse_patch.call import AttentionCall, Slot, causal_pairs
from sparse_patch.plans import BlockGrid, BlockPlan, Dense, PagePlan, Plan, Window
from sparse_patch.tensor_parallel import HeadShard

Spans = tuple[tuple[int, ...], tuple[Window, ...]]  # sinks and windows, see `SpanPlan`


class Retention(Protocol):
    """What each KV head of a layer keeps, if that is known before the tokens are; other keys may be forgotten."""

    def spans_of(self, shard: HeadShard, layer: int, length: int, kv_heads: int) -> Spans:
        """The sink and the window of each of the `kv_heads` KV heads of a layer that a process has.

        Args:
            shard: which of the layer's heads the process has.
            layer: the layer.
            length: tokens of prompt and answer together.
            kv_heads: KV heads of the process.

        Returns:
            Sinks and windows, as Python ints (no device sync). A window is None if its head keeps everything.
        """
        ...


class BoundMethod(ABC):
    """A method bound to one model.

    Attributes:
        settings: the settings, completed from the model; for the report.
        keeps_state: whether `remember` maintains tensors in `call.kv_state`, in addition to the keys.
        correct_every: number of sparsely decoded tokens after which they are computed again, densely; None if never.
        retention: what a cache has to keep; None if it has to keep every key.
    """

    settings: Any
    keeps_state: bool = False
    correct_every: int | None = None
    retention: Retention | None = None

    @abstractmethod
    def plan(self, call: AttentionCall) -> Plan:
        """Decide which keys each query of the call reads, without a host sync."""

    def why_dense(self, call: AttentionCall) -> Dense | None:
        """The part of `plan` that depends on the number of keys on the host; None if the plan is not dense for that.

        In a decode step that runs as a CUDA graph, `plan` is asked once for a range of lengths. So in decode only this
        function may look at `call.decisive_length`, at nothing else of the keys, and as rows get longer its answer may
        change once.
        """
        return None

    def remember(self, call: AttentionCall) -> None:
        """Bring `call.kv_state` up to date with the keys of a call (prefill or decode), before the call is planned."""
        return None

    def select(self, call: AttentionCall, logits: torch.Tensor, lse: torch.Tensor) -> None:
        """Choose for the layers that follow, after a plan with `wants_logits` was executed.

        Args:
            call: the call.
            logits: float32 `[B, Hq, capacity]` of the last query: scaled, softcapped, by position within the row
                (`kv_start[b]` is 0). Entries at or after the row's length have no meaning.
            lse: float32 `[B, Hq]` of the last query, natural logarithm.
        """
        raise NotImplementedError(f"{type(self).__name__} asks for logits and has no select")

    def role(self, layer: int) -> str:
        """The role of a layer that uses the method, in a word or two; empty if all layers do the same."""
        return ""

    def remark(self) -> str:
        """What a report should say about the settings, in addition to its numbers, as one line; may be empty."""
        return ""


class Selection(NamedTuple):
    """What a prefill method selects, on a grid.

    Attributes:
        blocks: the key blocks that each query block of each head reads, bool `[B, Hq, NQ, N]`. Blocks outside the
            causal triangle are dropped.
        columns: single keys that every query block after them reads in addition to its blocks, int64 `[B, Hq, C]`, as
            positions within the row. A negative entry is empty. None without columns.
        decided_pairs: see `BlockPlan`, int64 `[B, Hq]`.
        pv_threshold: see `BlockPlan`.
        is_causal: whether `blocks` has nothing outside the causal triangle; this saves a copy of `blocks`.
    """

    blocks: torch.Tensor
    columns: torch.Tensor | None = None
    decided_pairs: torch.Tensor | None = None
    pv_threshold: float | None = None
    is_causal: bool = False

    def plan(self, grid: BlockGrid, dense_tokens: int) -> BlockPlan:
        """Return the plan. Rows of at most `dense_tokens` tokens read everything."""
        blocks, decided, is_causal = self.blocks, self.decided_pairs, self.is_causal
        if grid.padded:  # otherwise all rows are as long as the call, which is not short
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
    """What the prefill template needs of its settings, a `PrefillMethod`."""

    @property
    def block_size(self) -> int: ...

    def why_dense(self, call: AttentionCall) -> Dense | None: ...

    def dense_tokens(self, call: AttentionCall) -> int: ...

    def select(self, call: AttentionCall, grid: BlockGrid) -> Selection | BlockPlan: ...


class BoundPrefill(BoundMethod):
    """The prefill template: dense answers, the grid, the short rows of a batch, the plan."""

    settings: SelectsBlocks

    def __init__(self, settings: SelectsBlocks) -> None:
        self.settings = settings

    def why_dense(self, call: AttentionCall) -> Dense | None:
        """See `BoundMethod.why_dense`."""
        return self.settings.why_dense(call)

    def plan(self, call: AttentionCall) -> Plan:
        """See `BoundMethod.plan`."""
        if dense := self.why_dense(call):
            return dense
        grid = BlockGrid.of(call, self.settings.block_size)
        selection = self.settings.select(call, grid)
        if isinstance(selection, BlockPlan):
            return selection
        return selection.plan(grid, self.settings.dense_tokens(call))


class ChoosesPages(Protocol):
    """What the decode template needs of its settings, a `DecodeMethod`."""

    @property
    def keeps_state(self) -> bool: ...

    @property
    def correct_every(self) -> int | None: ...

    def why_dense(self, call: AttentionCall) -> Dense | None: ...

    def is_short(self, call: AttentionCall) -> bool: ...

    def statistics(self, call: AttentionCall) -> Any: ...

    def choose(self, call: AttentionCall, statistics: Any) -> PagePlan: ...


class BoundDecode(BoundMethod):
    """The decode template: the state kept with the keys, dense answers, the choice."""

    _STATISTICS: Slot[Any] = Slot("statistics of a layer's keys")

    settings: ChoosesPages

    def __init__(self, settings: ChoosesPages) -> None:
        self.settings = settings
        self.keeps_state, self.correct_every = settings.keeps_state, settings.correct_every

    def remember(self, call: AttentionCall) -> None:
        """See `BoundMethod.remember`; the statistics are kept for the plan of the same call."""
        if not self.keeps_state or call.kv_state is None:
            return
        if call.length is None or not self.settings.is_short(call):  # the host may not know if a static cache is
            self._STATISTICS.put(call.forward_state, self.settings.statistics(call), call.layer)

    def why_dense(self, call: AttentionCall) -> Dense | None:
        """See `BoundMethod.why_dense`."""
        return self.settings.why_dense(call)

    def plan(self, call: AttentionCall) -> Plan:
        """See `BoundMethod.plan`."""
        if dense := self.why_dense(call):
            return dense
        statistics = self._STATISTICS.pop(call.forward_state, call.layer)
        if statistics is None:
            statistics = self.settings.statistics(call)
        return self.settings.choose(call, statistics)
