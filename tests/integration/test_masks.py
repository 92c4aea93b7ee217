"""The lazy mask against the masks that Transformers builds."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    blockwise_overlay,
    causal_mask_function,
    or_masks,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from sparse_patch.integration.masks import LazyMask, lazy_mask


def make(
    q_offset: int | torch.Tensor, q_length: int, padding: torch.Tensor | None = None, **changes: object
) -> LazyMask:
    total = int(q_offset) + q_length
    arguments = {
        "batch_size": 1 if padding is None else len(padding),
        "q_length": q_length,
        "kv_length": total,
        "q_offset": q_offset,
        "kv_offset": 0,
        "mask_function": causal_mask_function,
        "attention_mask": padding,
        "allow_is_causal_skip": False,
        "device": "cpu",
    }
    return lazy_mask(**{**arguments, **changes})


PADDING = torch.tensor([[1] * 30, [0] * 4 + [1] * 26, [0] * 29 + [1]], dtype=torch.bool)


def test_it_builds_what_transformers_builds_once() -> None:
    mask = make(10, 20, PADDING)
    assert torch.equal(mask.build("sdpa"), sdpa_mask(**mask.arguments))  # type: ignore[arg-type]
    assert mask.build("sdpa") is mask.build("sdpa")
    assert mask.build("an implementation without masks") is None


CALLS = pytest.mark.parametrize("q_offset, q_length", [(0, 30), (10, 20), (29, 1)])


def assert_counts(mask: LazyMask, causal: torch.Tensor | None, attended: torch.Tensor | None) -> None:
    assert causal is not None and attended is not None
    assert int(mask.work.causal) == causal.sum()
    assert int(mask.work.attended) == attended.sum()
    assert int(mask.work.queries) == causal[:, 0].any(-1).sum()


@CALLS
@pytest.mark.parametrize("padding", [None, PADDING], ids=["plain", "padded"])
@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_work_counts_the_mask(q_offset: int, q_length: int, padding: torch.Tensor | None, on_device: bool) -> None:
    mask = make(torch.tensor(q_offset) if on_device else q_offset, q_length, padding)
    assert_counts(mask, mask.build("sdpa"), mask.build("sdpa"))


@CALLS
@pytest.mark.parametrize("window", [1, 7, 15, 40])
def test_work_counts_a_window(q_offset: int, q_length: int, window: int) -> None:
    function = sliding_window_causal_mask_function(window)
    mask = make(q_offset, q_length, mask_function=function, local_size=window)
    assert_counts(mask, make(q_offset, q_length).build("sdpa"), mask.build("sdpa"))


def test_the_counter_of_a_static_cache_is_cloned() -> None:
    counter = torch.tensor(5)
    mask = make(counter, 3)
    counter += 3
    assert mask.q_start == 5


def test_row_starts_and_kinds_of_padding() -> None:
    assert make(0, 30, PADDING).real_row_starts.tolist() == [0, 4, 29]  # type: ignore[union-attr]
    assert make(0, 30, torch.ones(2, 30, dtype=torch.bool)).real_row_starts is None
    assert make(0, 30).real_row_starts is None
    right, hole, empty = (torch.ones(1, 30, dtype=torch.bool) for _ in range(3))
    right[:, 20:], hole[:, 10], empty[:] = False, False, False
    assert make(0, 30, PADDING).has_left_padding_only
    for padding in (right, hole, empty):
        assert not make(0, 30, padding).has_left_padding_only


def test_decode_is_a_few_queries_on_a_cache() -> None:
    assert make(10, 1).is_decode and make(10, 16).is_decode and make(torch.tensor(10), 1).is_decode
    assert not make(0, 1).is_decode and not make(10, 17).is_decode and not make(torch.tensor(10), 17).is_decode


@pytest.mark.parametrize("rows", [slice(-1, None), slice(5, 9), slice(None)], ids=str)
@pytest.mark.parametrize("padding", [None, PADDING], ids=["plain", "padded"])
@pytest.mark.parametrize("skip", [True, False])
def test_slicing_rows(rows: slice, padding: torch.Tensor | None, skip: bool) -> None:
    mask = make(0, 30, padding, kv_length=40, allow_is_causal_skip=skip)  # ten free slots, as in a static cache
    full = make(0, 30, padding, kv_length=40).build("sdpa")
    part = mask[:, :, rows, :].build("sdpa")
    assert full is not None
    if part is None:  # only where causality alone says the same
        assert rows == slice(None)
    else:
        assert torch.equal(part.expand(full[:, :, rows].shape), full[:, :, rows])


@pytest.mark.parametrize("implementation, dtype", [("sdpa", torch.bool), ("eager", torch.float32)])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["plain", "padded"])
def test_what_a_model_computes_on_it_is_computed_on_the_tensor(
    implementation: str, dtype: torch.dtype, padding: torch.Tensor | None
) -> None:
    """Also if the implementation itself would not need a mask."""
    config = LlamaConfig(attn_implementation=implementation)
    mask = make(0, 30, padding, config=config, allow_is_causal_skip=True, dtype=torch.float32)
    tensor = ALL_MASK_ATTENTION_FUNCTIONS[implementation](**{**mask.arguments, "allow_is_causal_skip": False})
    assert tensor is not None and tensor.dtype == dtype == mask.dtype
    scores = torch.zeros(tensor.shape, dtype=dtype)
    for given, expected in (
        (mask[:, 0], tensor[:, 0]),
        (mask[:, :, :, :3], tensor[:, :, :, :3]),
        (mask != 0, tensor != 0),
        (scores + mask, scores + tensor),
        (mask + scores, tensor + scores),
        (torch.where(mask == 0, 1, 2), torch.where(tensor == 0, 1, 2)),
        (torch.cat([scores, mask], -1), torch.cat([scores, tensor], -1)),
        (torch.nn.functional.pad(mask, (0, 2)), torch.nn.functional.pad(tensor, (0, 2))),
    ):
        assert torch.equal(given, expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["plain", "padded"])
def test_what_tensors_can_do(implementation: str, padding: torch.Tensor | None) -> None:
    """Cast, indexed, reduced, compared and calculated with, on either side."""
    config = LlamaConfig(attn_implementation=implementation)
    mask = make(0, 30, padding, config=config, allow_is_causal_skip=True, dtype=torch.float32)
    tensor, scores = mask.tensor(), torch.ones(mask.shape)
    works: list[Callable[[Any], Any]] = [
        lambda x: x.float(),
        lambda x: x.bool(),
        lambda x: x.type_as(scores),
        lambda x: x.to(scores),
        lambda x: x[..., :7],
        lambda x: x[:, :, :, :7],
        lambda x: x[None],
        lambda x: x[:, None],
        lambda x: x[:, :, None, :, :],
        lambda x: x[:, :, -1],
        lambda x: x[:, :, -1:],
        lambda x: x[:, :, ::2, :],
        lambda x: x[:, :, 2:9, :][..., :3],
        lambda x: x[:, :, 2:9, :][:, :, 1:3, :].tensor() if x is mask else x[:, :, 3:5, :],
        lambda x: x[:, :, torch.tensor([1, 2])],
        lambda x: x[x == 0],
        lambda x: x.shape[-1] + x.size(-1) + x.dim() + x.ndim + x.numel() + len(x),
        lambda x: x.expand(-1, 4, -1, -1).sum(),
        lambda x: x.reshape(x.shape[0], -1).any(-1),
        lambda x: x.transpose(-1, -2),
        lambda x: ~x.bool(),
        lambda x: 1.0 - x.float(),
        lambda x: scores * x,
        lambda x: x * scores,
        lambda x: scores + x + 1,
        lambda x: scores - 3 * (x != 0),
        lambda x: abs(scores @ (x + scores)),
        lambda x: scores.masked_fill(x == 0, 3),
        lambda x: torch.where(x < 0, scores, 0),
        lambda x: torch.stack([x, x]),
        lambda x: torch.logical_and(x, scores),
        lambda x: torch.zeros_like(x),
        lambda x: torch.stack(list(x)),
        lambda x: scores.clone().add_(x),
    ]
    for number, work in enumerate(works):
        found, expected = work(mask), work(tensor)
        same = torch.equal(found, expected) if torch.is_tensor(expected) else found == expected
        assert same and getattr(found, "dtype", None) == getattr(expected, "dtype", None), number
    if tensor.dtype.is_floating_point:
        for work in (lambda x: x**2, lambda x: x // 2, lambda x: 2 % (x + 1), lambda x: x @ scores, lambda x: abs(-x)):
            assert torch.equal(work(mask), work(tensor))


@pytest.mark.parametrize("padding", [None, PADDING], ids=["plain", "padded"])
def test_copies_of_a_mask(padding: torch.Tensor | None) -> None:
    mask = make(10, 20, padding, config=LlamaConfig(attn_implementation="sdpa"), dtype=torch.float32)
    built = mask.tensor()
    for twin in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), mask[:, :, :, :]):
        assert isinstance(twin, LazyMask) and twin is not mask
        assert torch.equal(twin.tensor(), built) and twin.q_start == 10 and twin.shape == mask.shape
    assert mask in {mask} and len({mask, copy.copy(mask)}) == 2


def test_it_passes_for_a_mask_tensor() -> None:
    mask = make(0, 30, PADDING)
    assert mask.ndim == 4 and mask.shape == (3, 1, 30, 30) and mask.contiguous() is mask
    assert mask.to("cpu") is mask and mask.to(torch.float16) is mask
    moved = mask.to("meta")
    assert moved.device.type == "meta" and moved.padding.device.type == "meta"  # type: ignore[union-attr]
    assert mask.to("meta") is moved
    assert lazy_mask(attention_mask=mask) is mask


def test_rows_of_a_prompt_are_prefill() -> None:
    """Also on another device, where the last layers of a model may be."""
    last = make(0, 30)[:, :, slice(-1, None), :]
    assert last.q_length == 1 and last.q_start == 29
    for mask in (last, last.to("meta")):
        assert not mask.is_decode and mask.fits
    assert make(40, 3)[:, :, slice(-1, None), :].is_decode


def test_images_add_nothing_for_a_last_token() -> None:
    """Transformers nevertheless builds the decode step of a static cache with the mask of images."""
    ids = torch.full((1, 40), -1)
    ids[:, 4:20] = 0
    union = or_masks(causal_mask_function, blockwise_overlay(ids))
    assert not make(0, 30, mask_function=union).is_plain_causal
    mask = make(29, 1, mask_function=union, kv_length=40)
    assert mask.is_plain_causal
    expected = sdpa_mask(**{**mask.arguments, "mask_function": union})
    assert expected is not None and torch.equal(mask.build("sdpa"), expected)  # type: ignore[arg-type]
    packed = and_masks(causal_mask_function, blockwise_overlay(ids))
    assert not make(29, 1, mask_function=packed).is_plain_causal
