"""Our caches behave like Transformers' caches: in inference mode, in copies and files, and if rows or ends change.

The oracle is a run in one piece on a `DynamicCache`, without gradients.
"""

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from families import llama
from method_table import CORRECTED, configurations
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from sparse_patch import growing_cache, patched, span_cache, sparsity_report
from sparse_patch.integration.caches.making import adopt
from sparse_patch.integration.caches.rings import RingLayer
from sparse_patch.integration.generation_cache import spans_of

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT, END = 290, 294
LENGTH = 420  # the length that the spans are made for
Mode = Callable[[], AbstractContextManager[Any]]
MODES: list[Mode] = [torch.inference_mode, torch.no_grad, torch.enable_grad]
VARIANTS = ("tidaldecode-kv_group", "tidaldecode-all", "quest-kv_group-sum-forced")  # keep the same as other cases
NAMES = [name for name, config in configurations(Path()).items() if "prefill" not in config and name not in VARIANTS]


@pytest.fixture(scope="module")
def frozen() -> PreTrainedModel:
    """No parameter needs gradients, so methods are sparse in every mode."""
    return llama(layers=5).requires_grad_(False)


def growing(model: PreTrainedModel) -> Cache:
    """What `generate` makes: layers that grow, or rings."""
    return span_cache(model, LENGTH)


def static(model: PreTrainedModel) -> Cache:
    """`growing` with a static cache."""
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    adopt(cache, spans_of(model), LENGTH)
    return cache


KINDS: list[tuple[str, Callable[[PreTrainedModel], Cache]]] = [
    *((name, growing) for name in NAMES),
    *((name, static) for name in ("kinetics", "moa", "quest-kv_group-max-added")),
]
EACH = pytest.mark.parametrize("name, build", KINDS, ids=[f"{name}-{build.__name__}" for name, build in KINDS])


def fed(
    model: PreTrainedModel,
    cache: Cache,
    pieces: Sequence[int],
    mode: Mode = torch.no_grad,
    rows: Sequence[int] = (0, 1),
) -> torch.Tensor:
    """The last logits of each piece of a padded batch, `[pieces - 1, B, vocabulary]`; `pieces` are the borders."""
    ids = torch.randint(3, 90, (2, END), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = []
    for a, b in pairwise(pieces):
        with mode():
            given = {"input_ids": ids[:, a:b], "attention_mask": mask[:, :b], "position_ids": positions[:, a:b]}
            logits.append(model(**given, past_key_values=cache).logits[:, -1])
    return torch.stack(logits).detach()


def uncut(model: PreTrainedModel, name: str, pieces: Sequence[int]) -> torch.Tensor:
    corrects = name == CORRECTED.name  # only our caches are corrected
    return fed(model, growing_cache(model.config) if corrects else DynamicCache(config=model.config), pieces)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@EACH
def test_modes_take_turns(name: str, build: Callable[..., Cache], plans: Path, frozen: PreTrainedModel) -> None:
    """Chunks of a prompt and tokens, each in another mode than the one before."""
    pieces = [0, 160, 250, PROMPT, *range(PROMPT + 1, END + 1)]
    with patched(frozen, {**configurations(plans)[name], "on_unsupported": "error"}):
        expected = uncut(frozen, name, pieces)
        for first in range(len(MODES)):
            cache = build(frozen)
            found = [
                fed(frozen, cache, pieces[i : i + 2], MODES[(first + i) % len(MODES)]) for i in range(len(pieces) - 1)
            ]
            close(torch.cat(found), expected)
        assert sparsity_report(frozen).layers[1].decode.sparse_calls >= 4 * 4
        is_ring = [isinstance(layer, RingLayer) for layer in cache.layers]
    assert all(is_ring) == any(is_ring) == (name in ("streamingllm", "moa", "duoattention"))


def through_a_file(cache: Cache) -> Cache:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    loaded: Cache = torch.load(file, weights_only=False)
    return loaded


def pickled(cache: Cache) -> Cache:
    loaded: Cache = pickle.loads(pickle.dumps(cache))
    return loaded


@EACH
def test_copies_go_their_own_way(name: str, build: Callable[..., Cache], plans: Path, frozen: PreTrainedModel) -> None:
    """Copies by `copy`, `pickle` and `torch.save` are made in one mode and used in another; also of an empty cache."""
    with patched(frozen, configurations(plans)[name]):
        expected = uncut(frozen, name, [0, PROMPT, PROMPT + 1, *range(PROMPT + 2, END + 1)])[-1]
        for number, how in enumerate((copy.deepcopy, pickled, through_a_file)):
            modes = [*MODES[number:], *MODES[:number]]
            with modes[0]():
                cache = how(build(frozen))
            fed(frozen, cache, [0, PROMPT, PROMPT + 1, PROMPT + 2], modes[1])
            with modes[0]():
                twin = how(cache)
            found = [fed(frozen, one, range(PROMPT + 2, END + 1), modes[2])[-1] for one in (cache, twin)]
            for logits in found:
                close(logits, expected)


@EACH
def test_rows_change_and_the_end_is_cut(
    name: str, build: Callable[..., Cache], plans: Path, frozen: PreTrainedModel
) -> None:
    with patched(frozen, configurations(plans)[name]):
        expected = uncut(frozen, name, [0, PROMPT, *range(PROMPT + 1, END + 1)])[-3:]
        for filling, changing, reading in ((0, 1, 2), (1, 0, 1)):
            cache = build(frozen)
            fed(frozen, cache, [0, PROMPT, *range(PROMPT + 1, END - 2)], MODES[filling])
            with MODES[changing]():
                cache.reorder_cache(torch.tensor([1, 0]))
                cache.batch_repeat_interleave(2)
                cache.batch_select_indices(torch.tensor([2, 0]))
            close(fed(frozen, cache, range(END - 3, END + 1), MODES[reading]), expected)
            if not isinstance(cache.layers[0], RingLayer):
                with MODES[changing]():
                    cache.crop(-3)
                close(fed(frozen, cache, range(END - 3, END + 1), MODES[reading]), expected)
            with MODES[changing]():
                cache.reset()
            close(fed(frozen, cache, [0, PROMPT, *range(PROMPT + 1, END + 1)], MODES[filling])[-3:], expected)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_unpatched_model(name: str, plans: Path) -> None:
    """Calls are then dense. A ring that has forgotten nothing yet gives way."""
    model, gradients = llama(layers=5), []
    ids = torch.randint(3, 90, (1, 40))
    for config in (None, configurations(plans)[name]):
        model.zero_grad()
        if config is None:
            cache: Any = DynamicCache(config=model.config)
            logits = [model(part, past_key_values=cache).logits for part in ids.split([37, 1, 1, 1], 1)]
        else:
            with patched(model, config, on_unsupported="silent"):
                cache = growing(model)
                logits = [model(part, past_key_values=cache).logits for part in ids.split([37, 1, 1, 1], 1)]
        torch.cat(logits, 1).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)
