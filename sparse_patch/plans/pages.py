"""Pages of keys for the last queries: what decode methods decide."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sparse_patch.call import AttentionCall, causal_pairs
from sparse_patch.kernels.availability import prefers_triton
from sparse_patch.plans.lists import leading, marked
from sparse_patch.plans.plan import SparsePlan


@dataclass(frozen=True)
class PagePlan(SparsePlan):
    """The pages of keys to read for each (row, list): the plan of decode methods. No length is read on the host.

    Page `u` of row `b` holds the keys `kv_start[b] + u*P ... + P-1`. Rows count from their own first key, so a
    left-padded row has the same pages as without the batch. Query `i` of the call reads the keys of the listed pages up
    to itself.

    Attributes:
        page_size: tokens per page, P; 1 for lists of tokens.
        heads: query heads, Hq.
        q_length: queries of the call, Sq.
        capacity: keys that the call's `k` has room for, valid or not (a Python int).
        lengths: real keys of each row, int64 `[B]`.
        kv_start: first real key of each row, int64 `[B]`; None if no row is padded.
        pages: int32 `[B, L, K]`; L is 1 (one list for all heads), Hkv or Hq. The first `counts` entries of a list are
            pages in any order, each at most once and each with a key at or before the last query. None reads every
            page.
        counts: int32 `[B, L]`; None reads every page.
        wants_logits: whether the method asks for the logits of the last query (see `DecodeMethod.select`); only a plan
            of every page may ask.
        kept: what a backend made of the lists, for the other layers that read by the same plan.
    """

    page_size: int
    heads: int
    q_length: int
    capacity: int
    lengths: torch.Tensor
    kv_start: torch.Tensor | None = None
    pages: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    wants_logits: bool = False
    kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def every(cls, call: AttentionCall, page_size: int = 1, wants_logits: bool = False) -> "PagePlan":
        """The plan of dense decode: every page."""
        _, heads, q_length, _ = call.q.shape
        of_rows = call.lengths(), call.kv_start
        return cls(page_size, heads, q_length, call.kv_length, *of_rows, wants_logits=wants_logits)

    @classmethod
    def of(cls, call: AttentionCall, pages: torch.Tensor, counts: torch.Tensor, page_size: int) -> "PagePlan":
        """The plan of listed pages; the arguments are like the attributes."""
        _, heads, q_length, _ = call.q.shape
        return cls(page_size, heads, q_length, call.kv_length, call.lengths(), call.kv_start, pages, counts)

    @property
    def num_pages(self) -> int:
        """The most pages that a row can have (a Python int)."""
        return -(-self.capacity // self.page_size)

    def mask(self) -> torch.Tensor:
        """The plan as a mask of tokens, bool `[B, Hq, Sq, capacity]`: for the oracle and for pictures."""
        device = self.lengths.device
        starts = torch.zeros_like(self.lengths) if self.kv_start is None else self.kv_start
        key = torch.arange(self.capacity, device=device) - starts[:, None]
        position = torch.arange(self.q_length, device=device) + (self.lengths - self.q_length)[:, None]
        causal = ((key[:, None, :] <= position[:, :, None]) & (key[:, None, :] >= 0))[:, None]
        if self.pages is None or self.counts is None:
            return causal.expand(-1, self.heads, -1, -1)
        read = marked(self.pages, self.counts, self.num_pages)
        page = (key.clamp(min=0) // self.page_size)[:, None].expand(-1, read.shape[1], -1)
        of_lists = read.gather(-1, page).repeat_interleave(self.heads // read.shape[1], 1)
        return of_lists[:, :, None] & causal

    def computed_pairs(self) -> torch.Tensor:
        """(Query, key) pairs of real tokens that the plan computes, int64 `[B, Hq]`."""
        if self.pages is None or self.counts is None:
            return self.causal_pairs()[:, None].expand(-1, self.heads)
        queries = torch.arange(self.q_length, device=self.pages.device)
        seen = (self.lengths - self.q_length + 1)[:, None] + queries  # keys that each query may read, [B, Sq]
        in_page = (seen[:, None, None] - self.pages[..., None] * self.page_size).clamp(0, self.page_size)
        pairs = (in_page.sum(-1) * leading(self.pages, self.counts)).sum(-1)
        return pairs.repeat_interleave(self.heads // pairs.shape[1], 1)

    def pairs_at(self, lengths: torch.Tensor) -> torch.Tensor | None:
        """See `SparsePlan.pairs_at`."""
        return lengths.sum().expand(self.heads) if self.pages is None else None

    def add_pairs(self, total: torch.Tensor) -> None:
        """See `SparsePlan.add_pairs`. On a GPU this is one kernel."""
        if not prefers_triton(total):
            super().add_pairs(total)
            return
        from sparse_patch.kernels.page_pairs.triton import add_page_pairs

        add_page_pairs(total, self.lengths, self.pages, self.counts, self.page_size, self.q_length)

    @property
    def stacks_with(self) -> Hashable | None:
        """See `SparsePlan.stacks_with`."""
        size = None if self.pages is None else self.pages.shape[1:]
        return self.page_size, self.heads, self.q_length, size, self.lengths.device

    def stacked(self, others: Sequence["PagePlan"]) -> "PagePlan":
        """See `SparsePlan.stacked`."""
        plans = (self, *others)
        lengths = torch.cat([plan.lengths for plan in plans])
        pages = [plan.pages for plan in plans if plan.pages is not None]
        counts = [plan.counts for plan in plans if plan.counts is not None]
        lists = (torch.cat(pages), torch.cat(counts)) if pages and counts else (None, None)
        return replace(self, lengths=lengths, kv_start=None, pages=lists[0], counts=lists[1])

    def causal_pairs(self) -> torch.Tensor:
        """See `SparsePlan.causal_pairs`."""
        return causal_pairs(self.lengths - self.q_length, self.lengths, torch.zeros_like(self.lengths))

    def block_map(self, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SparsePlan.block_map`. The map has one row, for the last query, and one block for each page."""
        page = torch.arange(self.num_pages, device=self.lengths.device)
        causal = page * self.page_size < self.lengths[0]
        if self.pages is None or self.counts is None:
            return causal[None].cpu(), causal[None].cpu()
        read = marked(self.pages, self.counts, self.num_pages)
        return (read[0, head * read.shape[1] // self.heads] & causal)[None].cpu(), causal[None].cpu()
