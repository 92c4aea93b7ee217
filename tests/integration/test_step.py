"""What the token of a step reads and counts, against the masks of Transformers."""

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from sparse_patch.integration import step
from sparse_patch.integration.step import Step, place_of, room_of, work_of
from sparse_patch.integration.transformers_internals import kind_of_window

STARTS = (0, 3, 19)


def at(length: int, starts: tuple[int, ...] = STARTS) -> Step:
    rows = torch.tensor(starts) if any(starts) else None
    return Step(torch.tensor(length), length, 64, starts, rows)


@pytest.mark.parametrize("window", [2, 3, 8, 30])
@pytest.mark.parametrize("spare", [1, 4, 256])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_the_places_that_are_read_have_the_tokens_that_the_mask_shows(
    window: int, spare: int, is_chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "SPARE", spare)
    starts = torch.tensor(STARTS)
    shows = chunked_causal_mask_function(window, starts) if is_chunked else sliding_window_causal_mask_function(window)
    for length in range(20, 60):
        now = at(length)
        reach, place = now.reach(window, is_chunked), place_of(length, window)
        assert int(now.place_in(window)) == place < room_of(window)
        assert int(reach.end) == reach.length == place + 1
        assert reach.starts is not None
        for row, first in enumerate(reach.starts.tolist()):
            read = [length - place + where for where in range(first, place + 1)]
            shown = [key for key in range(STARTS[row], length + 1) if shows(row, 0, torch.tensor(length), key)]
            assert first >= 0 and read == shown


def test_places_follow_each_other_until_a_room_is_full() -> None:
    turns = [n for n in range(1, 3000) if place_of(n, 100) != place_of(n - 1, 100) + 1]
    assert turns == list(range(99 + step.SPARE, 3000, step.SPARE))


def test_layers_that_keep_everything() -> None:
    padded, full = at(20).reach(None), at(20, (0, 0)).reach(None)
    assert padded.starts is not None and padded.starts.tolist() == list(STARTS) and full.starts is None
    assert int(padded.end) == int(full.end) == padded.length == full.length == 21


@pytest.mark.parametrize("window", [None, 2, 8, 25, 1000])
@pytest.mark.parametrize("starts", [(0,), (0, 0), STARTS])
def test_the_work_of_many_steps_is_the_sum_of_each(window: int | None, starts: tuple[int, ...]) -> None:
    for length in (19, 24, 40):
        for steps in (0, 1, 2, 30):
            works = [work_of(starts, length + i, window=window) for i in range(steps)]
            total = work_of(starts, length, steps, window)
            assert total.queries == steps * len(starts)
            assert total.causal == sum(work.causal for work in works)
            assert total.attended == sum(work.attended for work in works)
            one = sum(length + 1 - start for start in starts)
            assert at(length, starts).work(window).attended == min(one, len(starts) * (window or 1000))


def test_masks_of_windows_are_recognised() -> None:
    sliding, chunked = sliding_window_causal_mask_function(8), chunked_causal_mask_function(8, torch.zeros(1))
    assert (kind_of_window(sliding), kind_of_window(chunked)) == ("sliding", "chunked")
    blocks = blockwise_overlay(torch.zeros(1, 20))
    others = [
        causal_mask_function,
        or_masks(sliding, blocks),
        and_masks(sliding, blocks),
        and_masks(sliding_window_overlay(8), or_masks(causal_mask_function, blocks)),
        and_masks(sliding_window_overlay(8), causal_mask_function, blocks),
        and_masks(),
        None,
    ]
    assert [kind_of_window(other) for other in others] == [None] * len(others)
