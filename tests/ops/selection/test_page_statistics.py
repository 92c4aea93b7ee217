"""Statistics of pages and scores from them, in Triton and in PyTorch, against loops over the keys."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from calls import make_call
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_patch.call import AttentionCall, KVState
from sparse_patch.ops.selection import page_statistics as ops
from sparse_patch.ops.selection.page_statistics import torch as in_torch
from sparse_patch.ops.selection.page_statistics import triton as in_triton
from sparse_patch.ops.selection.page_statistics import update as kept
from sparse_patch.ops.selection.page_statistics.update import PAGES


@pytest.fixture(params=[in_torch, in_triton], ids=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The backend that the ops use in this test."""
    module: ModuleType = request.param
    monkeypatch.setattr(kept, "prefers_triton", lambda _: module is in_triton)
    monkeypatch.setattr(ops, "prefers_triton", lambda _: module is in_triton)
    return module


def pages_of_row(call: AttentionCall, row: int, page_size: int, offset: int = 0) -> list[torch.Tensor]:
    """The keys of each page of a row, `[Hkv, tokens, D]` each."""
    start = 0 if call.kv_start is None else int(call.kv_start[row])
    end = call.kv_length if call.kv_end is None else int(call.kv_end)
    return [call.k[row, :, j : min(j + page_size, end)] for j in range(start + offset, end, page_size)]


def assert_bounds(call: AttentionCall, page_size: int) -> None:
    """Assert that the bounds of every page of every row are those of its keys."""
    low, high = ops.page_bounds(call, page_size)
    assert low.shape == high.shape == (*call.k.shape[:2], -(-call.kv_length // page_size), call.k.shape[-1])
    assert low.dtype == high.dtype == call.k.dtype
    for row in range(len(call.k)):
        for page, keys in enumerate(pages_of_row(call, row, page_size)):
            assert torch.equal(low[row, :, page], keys.amin(1)), (row, page)
            assert torch.equal(high[row, :, page], keys.amax(1)), (row, page)


def assert_means(call: AttentionCall, page_size: int, offset: int) -> None:
    means = ops.page_means(call, page_size, offset)
    assert means.shape[2] == max(0, -(-(call.kv_length - offset) // page_size)) and means.dtype == call.k.dtype
    tolerance = 1e-6 if call.k.dtype == torch.float32 else 2e-3
    for row in range(len(call.k)):
        for page, keys in enumerate(pages_of_row(call, row, page_size, offset)):
            expected = keys.float().mean(1).to(call.k.dtype)
            torch.testing.assert_close(means[row, :, page], expected, atol=tolerance, rtol=tolerance)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("length", [1, 3, 4, 5, 15, 16, 17, 20, 33])
@pytest.mark.parametrize("dtype, remembers", [(torch.float32, True), (torch.float16, False)], ids=["32", "16"])
def test_from_scratch(length: int, dtype: torch.dtype, remembers: bool) -> None:
    call = make_call(length, heads=(4, 2), head_dim=24, dtype=dtype)
    for page_size in (5, 16) if length > 5 else (1, 5):
        memories = [KVState() if remembers else None for _ in range(3)]
        assert_bounds(replace(call, kv_state=memories[0]), page_size)
        assert_means(replace(call, kv_state=memories[1]), page_size, 0)
        assert_means(replace(call, kv_state=memories[2]), page_size, 4)
        assert all(kv_state.covered == length for kv_state in memories if kv_state)


@pytest.mark.usefixtures("backend")
def test_padding_changes_nothing() -> None:
    call = make_call(70, row_starts=[0, 5, 16, 69], head_dim=20)
    for kv_state in (None, KVState()):
        assert_bounds(replace(call, kv_state=kv_state), 16)
    for kv_state in (None, KVState()):
        assert_means(replace(call, kv_state=kv_state), 16, 4)


class Cache:
    """A cache with one layer: keys that grow, shrink and change rows, with the memory beside them."""

    def __init__(self, row_starts: list[int] | None, kinds: tuple[str, ...] = ("bounds", "means")) -> None:
        batch = len(row_starts) if row_starts else 2
        self.keys = torch.empty(batch, 2, 0, 8)
        self.starts = torch.tensor(row_starts) if row_starts else None
        self.memories = {kind: KVState() for kind in kinds}

    def call(self, tokens: int) -> AttentionCall:
        q_start = self.keys.shape[2]
        new = torch.randn(len(self.keys), 2, tokens, 8)
        self.keys = torch.cat([self.keys, new], 2)
        for row, start in enumerate([] if self.starts is None else self.starts.tolist()):
            self.keys[row, :, :start] = 1e4
        q = torch.randn(len(self.keys), 4, tokens, 8)
        return AttentionCall(q, self.keys, self.keys, 1.0, 0, "decode", q_start=q_start, kv_start=self.starts)

    def crop(self, length: int) -> None:
        self.keys = self.keys[:, :, :length]

    def change_rows(self, rows: torch.Tensor) -> None:
        self.keys = self.keys[rows]
        self.starts = None if self.starts is None else self.starts[rows]
        for kv_state in self.memories.values():
            kv_state.change_rows(lambda tensor: tensor[rows])

    def check(self, tokens: int, page_size: int = 4) -> None:
        call = self.call(tokens)
        assert_bounds(replace(call, kv_state=self.memories["bounds"]), page_size)
        assert_means(replace(call, kv_state=self.memories["means"]), page_size, 3)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("row_starts", [None, [13, 2]], ids=str)
def test_append_crop_and_reorder(row_starts: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happened to the cache, the statistics equal those computed from scratch."""
    monkeypatch.setattr(kept, "SPARE", 5)
    cache = Cache(row_starts)
    for tokens in (10, 5, 1, 1, 1, 1, 1, 3, 1):  # with padding, the second chunk begins inside it
        cache.check(tokens)
    for length in (21, 16):
        cache.crop(length)
        cache.check(1)
        cache.check(2)
    cache.change_rows(torch.tensor([1, 0]))
    for _ in range(4):
        cache.check(1)
    cache.change_rows(torch.tensor([0, 0, 1]))
    for tokens in (1, 20, 1):
        cache.check(tokens)


@pytest.mark.usefixtures("backend")
def test_tokens_that_went_by_unseen_are_caught_up() -> None:
    cache = Cache([0, 3])
    cache.check(9)
    cache.call(30)  # by a layer that was not patched then
    cache.check(1)


def test_only_pages_of_new_tokens_are_computed(backend: ModuleType) -> None:
    cache = Cache(None)
    cache.check(40)
    cache.memories["bounds"].of(PAGES)["low/4"][:, :, :9] = 77.0
    call = replace(cache.call(2), kv_state=cache.memories["bounds"])
    low, _ = ops.page_bounds(call, 4)
    assert (low[:, :, :9] == 77.0).all() and (low[:, :, 10] != 77.0).any()


def test_another_kind_takes_the_place_of_the_first() -> None:
    """Statistics that are no longer refreshed must not be found later."""
    cache, kv_state = Cache(None), KVState()
    assert_bounds(replace(cache.call(10), kv_state=kv_state), 4)
    assert_means(replace(cache.call(10), kv_state=kv_state), 4, 0)
    assert_bounds(replace(cache.call(10), kv_state=kv_state), 4)
    assert_bounds(replace(cache.call(1), kv_state=kv_state), 8)
    assert len(kv_state.of(PAGES)) == 2


def test_room_grows_with_the_buffer_of_the_keys() -> None:
    kv_state = KVState()
    buffer = torch.randn(1, 2, 200, 8)
    pointers = set()
    for end in (20, *range(21, 120)):
        k = buffer[:, :, :end]
        q = torch.randn(1, 4, 20 if end == 20 else 1, 8)
        assert_bounds(AttentionCall(q, k, k, 1.0, 0, "decode", q_start=end - q.shape[2], kv_state=kv_state), 16)
        pointers.add(kv_state.of(PAGES)["low/16"].data_ptr())
    assert len(pointers) == 1 and kv_state.of(PAGES)["low/16"].shape[2] == 13


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("row_starts", [None, [0, 9]], ids=str)
@pytest.mark.parametrize("prefill", [30, 0])
def test_static_cache(row_starts: list[int] | None, prefill: int) -> None:
    """The buffer is NaN after its end. The memory is filled by prefill, or at the first decode step."""
    buffer = torch.full((2, 2, 61, 8), torch.nan)
    starts = torch.tensor(row_starts) if row_starts else None
    memories = KVState(), KVState()

    def check(call: AttentionCall) -> None:
        assert_bounds(replace(call, kv_state=memories[0]), 8)
        assert_means(replace(call, kv_state=memories[1]), 8, 4)

    def write(begin: int, end: int) -> torch.Tensor:
        buffer[:, :, begin:end] = torch.randn(2, 2, end - begin, 8)
        for row, start in enumerate(row_starts or []):
            buffer[row, :, :start] = -1e4
        return torch.randn(2, 4, end - begin, 8)

    q = write(0, 30)
    if prefill:
        k = buffer[:, :, :30]
        check(AttentionCall(q, k, k, 1.0, 0, "prefill", q_start=0, kv_start=starts))
    end, pointers = 30, set()
    for tokens in (1, 1, 3, 1, 1, 16, 1, 7):
        q = write(end, end + tokens)
        end += tokens
        check(AttentionCall(q, buffer, buffer, 1.0, 0, "decode", kv_start=starts, kv_end=torch.tensor(end)))
        pointers.add(memories[0].of(PAGES)["high/8"].data_ptr())
    assert end == 61 and len(pointers) == 1


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("length", [1, 17, 64])
def test_scores(heads: tuple[int, int], dtype: torch.dtype, length: int) -> None:
    """Bounds and means equal loops over pages, and no key of a page is above its bound."""
    starts = [0, min(5, length - 1), length - 1]
    call = make_call(length, heads=heads, head_dim=24, dtype=dtype, row_starts=starts)
    q = call.q[:, :, -1]
    low, high = ops.page_bounds(call, 16)
    bounds = ops.bound_scores(q, low, high, call.lengths(), 16)
    means = ops.mean_scores(q, ops.page_means(call, 16, 4), call.lengths(), 16, 4)
    assert bounds.dtype == means.dtype == torch.float32
    for row in range(3):
        for head in range(heads[0]):
            query, of = q[row, head].double(), head // call.group_size
            pages = [keys[of].double() for keys in pages_of_row(call, row, 16)]
            expected = torch.tensor([torch.maximum(query * keys.amin(0), query * keys.amax(0)).sum() for keys in pages])
            torch.testing.assert_close(bounds[row, head, : len(pages)], expected.float(), atol=1e-3, rtol=1e-5)
            assert bounds[row, head, len(pages) :].isneginf().all()
            largest = torch.stack([(keys @ query).max() for keys in pages])
            assert (largest <= bounds[row, head, : len(pages)] + 1e-3).all()
            pages = [keys[of].double() for keys in pages_of_row(call, row, 16, 4)]
            assert means[row, head, len(pages) :].isneginf().all()
            if pages:
                expected = torch.stack([(keys @ query).mean() for keys in pages]).float()
                tolerance = 1e-4 if dtype == torch.float32 else 3e-2
                torch.testing.assert_close(means[row, head, : len(pages)], expected, atol=tolerance, rtol=1e-3)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("group, of_heads", [("sum", torch.sum), ("max", torch.amax), ("mean", torch.mean)])
def test_scores_of_groups(heads: tuple[int, int], group: Any, of_heads: Callable[..., torch.Tensor]) -> None:
    call = make_call(50, heads=heads, head_dim=24, row_starts=[0, 48])
    q, low_and_high, lengths = call.q[:, :, -1] - 3, ops.page_bounds(call, 16), call.lengths()
    means = ops.page_means(call, 16, 4)
    for score, statistics, offset in ((ops.bound_scores, low_and_high, ()), (ops.mean_scores, (means,), (4,))):
        separate = score(q, *statistics, lengths, 16, *offset).unflatten(1, (heads[1], -1))
        together = score(q, *statistics, lengths, 16, *offset, group)
        torch.testing.assert_close(together, of_heads(separate, 2))


@pytest.mark.usefixtures("backend")
def test_bounds_hold_after_append_crop_and_reorder() -> None:
    cache = Cache([0, 7])

    def check(tokens: int) -> None:
        call = replace(cache.call(tokens), kv_state=cache.memories["bounds"])
        q = torch.randn(len(call.k), 4, 8)
        bounds = ops.bound_scores(q, *ops.page_bounds(call, 4), call.lengths(), 4)
        for row in range(len(call.k)):
            for page, keys in enumerate(pages_of_row(call, row, 4)):
                logits = (keys.repeat_interleave(2, 0) @ q[row, :, :, None]).amax((1, 2))
                assert (logits <= bounds[row, :, page] + 1e-4).all()

    check(20)
    for tokens in (1, 1, 5, 1):
        check(tokens)
    cache.crop(18)
    check(1)
    cache.change_rows(torch.tensor([1, 1, 0]))
    check(1)


@pytest.mark.usefixtures("backend")
def test_pages_without_a_key_are_never_read() -> None:
    low, high = (torch.full((2, 2, 5, 8), torch.nan) for _ in range(2))
    low[0, :, :3], high[0, :, :3] = -1.0, 1.0
    q = torch.ones(2, 4, 8)
    for scores in (
        ops.bound_scores(q, low, high, torch.tensor([12, 0]), 4),
        ops.mean_scores(q, high, torch.tensor([14, 2]), 4, 2),
    ):
        assert (scores[0, :, :3] == 8).all() and scores[0, :, 3:].isneginf().all() and scores[1].isneginf().all()


@pytest.mark.usefixtures("backend")
def test_scores_of_a_groups_mean_query_are_the_groups_mean_scores() -> None:
    q, means, lengths = torch.randn(2, 6, 8), torch.randn(2, 2, 5, 8), torch.tensor([20, 20])
    of_group = ops.mean_scores(q.unflatten(1, (2, 3)).mean(2), means, lengths, 4)
    torch.testing.assert_close(of_group, ops.mean_scores(q, means, lengths, 4).unflatten(1, (2, 3)).mean(2))


def test_no_host_sync() -> None:
    with FakeTensorMode():
        k, kv_state = torch.empty(2, 2, 61, 8), KVState()
        starts, end = torch.empty(2, dtype=torch.int64), torch.empty((), dtype=torch.int64)
        call = AttentionCall(
            torch.empty(2, 4, 1, 8), k, k, 1.0, 0, "decode", kv_start=starts, kv_end=end, kv_state=kv_state
        )
        for _ in range(2):
            low, high = ops.page_bounds(call, 16)
            assert ops.bound_scores(call.q[:, :, -1], low, high, call.lengths(), 16).shape == (2, 4, 4)
        means = ops.page_means(call, 16, 4)
        assert ops.mean_scores(call.q[:, :, -1], means, call.lengths(), 16, 4).shape == (2, 4, 4)


def test_it_compiles_without_a_graph_break() -> None:
    buffer = torch.randn(1, 2, 64, 8)
    kv_state, start = KVState(), 20

    def step(q: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        call = AttentionCall(q, buffer, buffer, 1.0, 0, "decode", kv_end=end, kv_state=kv_state)
        low, high = ops.page_bounds(call, 16)
        return ops.bound_scores(q[:, :, -1], low, high, call.lengths(), 16)

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    k = buffer[:, :, :start]
    ops.page_bounds(AttentionCall(torch.randn(1, 4, start, 8), k, k, 1.0, 0, "prefill", kv_state=kv_state), 16)
    for end in range(start + 1, start + 30):
        q = torch.randn(1, 4, 1, 8)
        call = AttentionCall(q, buffer, buffer, 1.0, 0, "decode", kv_end=torch.tensor(end))
        expected = ops.bound_scores(q[:, :, -1], *ops.page_bounds(call, 16), torch.tensor([end]), 16)
        torch.testing.assert_close(compiled(q, torch.tensor(end)), expected)


def test_the_kernels_declare_what_they_do() -> None:
    """torch.compile relies on their schemas, mutations and shapes."""
    k, starts, end = torch.randn(2, 2, 20, 8), torch.tensor([0, 3]), torch.tensor(18)
    low, high = torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 8)
    opcheck = partial(torch.library.opcheck, test_utils=("test_schema", "test_faketensor"))
    opcheck(in_triton.refresh_bounds.op, (low, high, k, starts, end, 0, 3, 4, 0))
    opcheck(in_triton.refresh_means.op, (low, k, None, None, 20, 3, 4, 4))
    opcheck(in_triton.score_pages.op, (torch.randn(2, 4, 8), high, low, torch.tensor([18, 15]), 4, 0, "sum"))
