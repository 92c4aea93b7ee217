"""Decode steps of models with sliding windows and chunks, as graphs and eagerly.

The rooms of the windows have few places here, so that the tokens move to the front of a room every few steps.
"""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import families
import pytest
import torch
from builders.stepping import generated, prompt, stepped
from families import WINDOW, gemma2, gemma3, image_inputs, mistral
from transformers import Cache, DynamicCache, PreTrainedModel

from sparse_patch import growing_cache, patched, span_cache, sparsity_report
from sparse_patch.integration import step
from sparse_patch.integration.caches.windows import WindowLayer
from sparse_patch.integration.graphs import inputs, stepped_cache
from sparse_patch.report import SparsityReport

pytestmark = pytest.mark.usefixtures("one_thread")
SPARE = 5
NEW = 30
DENSE = {"decode": {"method": "dense"}}
QUEST = {"decode": {"method": "quest", "budget": 24, "page_size": 8, "min_length": 0, "layers": "all"}}
SPANS = {"both": {"method": "streamingllm", "sink": 4, "window": 20}}
KINDS = {"dense": DENSE, "quest": QUEST, "spans": SPANS}
NAMES = ("gemma2", "gemma3", "gemma3n", "gemma4", "gpt_oss", "llama4", "mistral", "qwen2_windowed")
WITH_FULL_LAYERS = ("gemma2", "gemma4", "gpt_oss", "llama4")
SHORT, LONG = WINDOW - 5, 55  # the first chunk of Llama 4 ends after 64 tokens
CASES = [
    *((name, "dense", length) for name in NAMES for length in (SHORT, LONG)),
    *((name, kind, LONG) for name in WITH_FULL_LAYERS for kind in ("quest", "spans")),
]
Build = Callable[[], PreTrainedModel]
SOME = pytest.mark.parametrize("build", [gemma2, gemma3, mistral])


@pytest.fixture(autouse=True)
def _small_rooms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "SPARE", SPARE)


@pytest.fixture
def without_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function that lets every forward run as on a CPU."""
    return lambda: monkeypatch.setattr(inputs, "can_record", lambda x: False)


def counted(report: SparsityReport) -> list[Any]:
    """What was counted in decode, layer by layer, without the kernels of dense calls."""
    return [
        (layer.decode.calls, layer.decode.sparse_calls, layer.decode.pairs, layer.decode.dense, layer.decode.fallbacks)
        for layer in report.layers
    ]


def ragged(length: int) -> dict[str, torch.Tensor]:
    """Three rows, padded on the left; in a long prompt, one row by more than a window."""
    mask = torch.ones(3, length, dtype=torch.int64)
    mask[1, : length // 3], mask[2, : length - 3] = 0, 0
    return {"ids": prompt(length, rows=3), "attention_mask": mask}


def by_graph_and_eagerly(model: PreTrainedModel, config: Any, run: Callable[[], Any]) -> tuple[Any, SparsityReport]:
    """The same result by graphs and by eager steps, with the report of the graphs."""
    with patched(model, config, decode_graph="off"):
        eager, of_eager = run(), sparsity_report(model)
    with patched(model, config):
        found, report = run(), sparsity_report(model)
    assert all(map(torch.equal, found, eager))
    assert counted(report) == counted(of_eager)
    assert of_eager.graphs.eager == report.graphs.eager
    return found, report


@pytest.mark.parametrize("name, kind, length", CASES)
def test_padded_rows(name: str, kind: str, length: int, without_steps: Callable[[], None]) -> None:
    """Steps give what forwards give that are no steps, in logits and in counts."""
    model, batch, config = getattr(families, name)(), ragged(length), KINDS[kind]
    (logits,), report = by_graph_and_eagerly(model, config, lambda: [generated(model, new=NEW, **batch)])
    assert report.graphs.replays >= NEW - 3 and not report.graphs.eager
    without_steps()
    with patched(model, config):
        expected = generated(model, new=NEW, **batch)
        assert counted(report) == counted(sparsity_report(model))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    if kind == "dense":
        assert torch.equal(expected, generated(model, new=NEW, **batch))


@SOME
def test_one_row_without_a_mask(build: Build) -> None:
    """One graph serves all places of the rooms."""
    model = build()
    (logits,), report = by_graph_and_eagerly(model, DENSE, lambda: [generated(model, prompt(LONG), NEW)])
    assert (report.graphs.captures, report.graphs.replays) == (1, NEW - 2)
    torch.testing.assert_close(logits, generated(model, prompt(LONG), NEW), rtol=1e-4, atol=1e-4)


@SOME
def test_a_continued_chat(build: Build) -> None:
    model = build()

    def run(make: Callable[[Any], Cache]) -> list[torch.Tensor]:
        cache, chat, logits = make(model.config), prompt(SHORT), []
        for turn in range(4):
            options = {"max_new_tokens": 11, "do_sample": False, "attention_mask": torch.ones_like(chat)}
            options |= {"return_dict_in_generate": True, "output_logits": True}
            answer = model.generate(chat, past_key_values=cache, **options)
            logits.append(torch.stack(answer.logits, 1))
            chat = torch.cat([answer.sequences, prompt(1 + 7 * turn, seed=turn)], 1)
        return logits

    found, report = by_graph_and_eagerly(model, DENSE, lambda: run(growing_cache))
    assert report.graphs.replays >= 30
    torch.testing.assert_close(found, run(lambda config: DynamicCache(config=config)), rtol=1e-4, atol=1e-4)


@SOME
def test_beams(build: Build) -> None:
    model = build()
    options = {"max_new_tokens": 20, "num_beams": 3, "do_sample": False}
    (found,), report = by_graph_and_eagerly(model, DENSE, lambda: [model.generate(prompt(20, rows=2), **options)])
    assert torch.equal(found, model.generate(prompt(20, rows=2), **options))
    assert not report.graphs.eager
    assert report.graphs.replays > 0 or build is not mistral, "the rows of a window change in their room"


@SOME
def test_a_cache_that_is_cut_reordered_or_copied(build: Build) -> None:
    model = build()

    def run(make: Callable[[Any], Cache]) -> list[torch.Tensor]:
        cache, ids = make(model.config), prompt(SHORT - 3, rows=2)
        logits = [stepped(model, ids, 6, cache)]
        cache.crop(-4)  # the window is not full yet
        logits.append(stepped(model, ids[:, :1], 20, cache))
        other = copy.deepcopy(cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        logits.append(stepped(model, ids[:, :1], 8, cache))
        cache.batch_repeat_interleave(2)
        logits.append(stepped(model, ids[[0, 0, 1, 1], :1], 8, cache))
        cache.batch_select_indices(torch.tensor([0]))
        logits.append(stepped(model, ids[:1, :1], 8, cache))
        logits.append(stepped(model, ids, 8, other))
        with pytest.raises(RuntimeError, match="past"):
            other.crop(-1)
        cache.reset()
        logits.append(stepped(model, ids, 8, cache))
        return logits

    found, report = by_graph_and_eagerly(model, DENSE, lambda: run(growing_cache))
    assert report.graphs.replays >= 40
    torch.testing.assert_close(found, run(lambda config: DynamicCache(config=config)), rtol=1e-4, atol=1e-4)


@SOME
@pytest.mark.parametrize("verifies", ["prompt lookup", "assistant"])
def test_assisted_decoding(build: Build, verifies: str) -> None:
    """A window from which tokens are taken back is no place for steps; the reason is in the report."""
    model = build()
    assists: dict[str, Any] = {"prompt_lookup_num_tokens": 3} if verifies == "prompt lookup" else {}
    assists = assists or {"assistant_model": build()}
    ids, options = prompt(LONG), {"max_new_tokens": 20, "do_sample": False, **assists}
    expected = model.generate(ids, **options)
    with patched(model, DENSE):
        assert torch.equal(model.generate(ids, **options), expected)
        graphs = sparsity_report(model).graphs
    assert graphs.replays == 0
    assert set(graphs.eager) <= {"a sliding window that tokens may be taken back from"}


@SOME
def test_a_room_stays_in_its_place(build: Build) -> None:
    """A window takes the memory of its room, whatever the length, and the prompt's tensors are free."""
    model = build()
    with patched(model, DENSE), torch.no_grad():
        cache = growing_cache(model.config)
        stepped(model, prompt(200), 2, cache)
        windows = [layer for layer in cache.layers if isinstance(layer, WindowLayer)]
        places = [layer.place() for layer in windows]
        stepped(model, prompt(1), 40, cache)
        stepped(model, prompt(60), 20, cache)
    assert windows and places == [layer.place() for layer in windows]
    for layer in windows:
        for kept in (layer.keys, layer.values):
            rows, heads, tokens, dim = kept.shape
            assert (tokens, layer.get_seq_length()) == (WINDOW - 1, 320)
            assert kept.untyped_storage().nbytes() == rows * heads * (WINDOW - 1 + SPARE) * dim * 4


@SOME
def test_a_room_for_a_short_text(build: Build) -> None:
    """A cache that knows that few tokens come makes no more places, until more come than it was told."""
    model = build()
    with patched(model, DENSE):
        cache = span_cache(model, SHORT + 4)
        logits = stepped(model, prompt(SHORT), 4, cache)
        windows = [layer for layer in cache.layers if isinstance(layer, WindowLayer)]
        sizes = [kept.untyped_storage().nbytes() for layer in windows for kept in (layer.keys, layer.values)]
        assert sizes == [(SHORT + 4) * layer.keys[:, :, :1].nbytes for layer in windows for _ in range(2)]
        logits = torch.cat([logits, stepped(model, logits[:, -1].argmax(-1, keepdim=True), 30, cache)], 1)
        assert not sparsity_report(model).graphs.eager
    torch.testing.assert_close(logits, stepped(model, prompt(SHORT), 34), rtol=1e-4, atol=1e-4)


@SOME
def test_tokens_are_those_of_transformers(build: Build) -> None:
    """Between steps, in any mode, keys, values, lengths and masks are those of `DynamicSlidingWindowLayer`."""
    model, ids = build(), prompt(90, rows=2)
    ours, theirs = growing_cache(model.config), DynamicCache(config=model.config)
    borders = [0, 7, *range(8, 30), 37, *range(38, 61), 90]
    for begin, end in pairwise(borders):
        with patched(model, DENSE), torch.inference_mode() if begin % 3 else torch.no_grad():
            model(input_ids=ids[:, begin:end], past_key_values=ours)
        with torch.no_grad():
            model(input_ids=ids[:, begin:end], past_key_values=theirs)
        for our, their in zip(ours.layers, theirs.layers, strict=True):
            torch.testing.assert_close([our.keys, our.values], [their.keys, their.values], rtol=1e-4, atol=1e-4)
            assert our.get_seq_length() == their.get_seq_length() == end
            assert [our.get_mask_sizes(n) for n in (1, 5)] == [their.get_mask_sizes(n) for n in (1, 5)]


def test_texts_of_unknown_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """If all layers are windows and the cache does not know a length, padding is prepared for more and more tokens."""
    monkeypatch.setattr(stepped_cache, "SPARE", 8)
    model, batch = mistral(), ragged(20)

    def run() -> list[torch.Tensor]:
        return [generated(model, new=60, past_key_values=growing_cache(model.config), **batch)]

    (found,), report = by_graph_and_eagerly(model, DENSE, run)
    assert report.graphs.captures == 3 and not report.graphs.eager, "for up to 32, 64 and 128 tokens"
    torch.testing.assert_close(found, generated(model, new=60, **batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vlm", "gemma4_vlm"])
def test_text_after_an_image(name: str, without_steps: Callable[[], None]) -> None:
    model = getattr(families, name)()
    image = image_inputs(model, LONG)
    image["ids"] = image.pop("input_ids")
    (found,), report = by_graph_and_eagerly(model, QUEST, lambda: [generated(model, new=20, **image)])
    assert report.graphs.replays == 18
    without_steps()
    with patched(model, QUEST):
        torch.testing.assert_close(found, generated(model, new=20, **image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [WINDOW - 3, WINDOW + 4])
def test_a_cache_with_another_window_than_the_model(width: int) -> None:
    """No step reads a room by the wrong window."""
    model, ids = mistral(), prompt(20)
    with patched(model, DENSE):
        cache = growing_cache(model.config)
        cache.layers = [WindowLayer(width) for _ in cache.layers]
        theirs = DynamicCache(config=model.config)
        for layer in theirs.layers:
            layer.sliding_window = width
        found = stepped(model, ids, 9, cache)
        assert sparsity_report(model).graphs.eager == {"the cache returns other keys than the mask describes": 8}
    assert torch.equal(found, stepped(model, ids, 9, theirs))
