"""A decode step that runs as a graph gives what it gives eagerly, bit for bit, whatever happens around it."""

import copy
import gc
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from builders.stepping import generated, prompt, stepped
from families import llama
from method_table import configurations
from together import at_once
from transformers import PreTrainedModel

from sparse_patch import growing_cache, patch_model, patched, reset_report, span_cache, sparsity_report
from sparse_patch.report import SparsityReport

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = list(configurations(Path()))
QUEST = {"decode": {"method": "quest", "budget": 48, "page_size": 8, "min_length": 0, "layers": "all"}}
SPANS = {"both": {"method": "streamingllm", "sink": 4, "window": 40}}
DENSE = {"decode": {"method": "dense"}}
KINDS = {"quest": QUEST, "spans": SPANS, "dense": DENSE}


def counted(report: SparsityReport) -> list[Any]:
    """What was counted in decode, layer by layer, without the kernels of dense calls."""
    return [
        (layer.decode.calls, layer.decode.sparse_calls, layer.decode.pairs, layer.decode.dense)
        for layer in report.layers
    ]


def both_ways(model: PreTrainedModel, config: Any, *args: Any, **options: Any) -> tuple[SparsityReport, SparsityReport]:
    """Generate eagerly and by graphs, and compare the logits; return both reports."""
    results = []
    for decode_graph in ("off", "auto"):
        with patched(model, config, decode_graph=decode_graph, on_unsupported="error"):
            results.append((generated(model, *args, **options), sparsity_report(model)))
    (eager, of_eager), (by_graph, of_graph) = results
    assert torch.equal(by_graph, eager)
    assert of_eager.graphs.captures == of_eager.graphs.replays == 0
    return of_eager, of_graph


@pytest.mark.parametrize("name", NAMES)
def test_every_method_gives_the_same_by_graphs(name: str, plans: Path, five_layers: PreTrainedModel) -> None:
    of_eager, of_graph = both_ways(five_layers, configurations(plans)[name], prompt(200), 14)
    assert (of_graph.graphs.captures, of_graph.graphs.replays) == (1, 12)
    assert set(of_graph.graphs.eager) <= {"cache correction"}
    assert counted(of_graph) == counted(of_eager)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_gives_what_decode_gives_without_steps(
    name: str, plans: Path, five_layers: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configurations(plans)[name]
    with patched(five_layers, config):
        by_graph, report = generated(five_layers, prompt(200), 6), sparsity_report(five_layers)
    monkeypatch.undo()
    with patched(five_layers, config):
        usual = generated(five_layers, prompt(200), 6)
        assert counted(report) == counted(sparsity_report(five_layers))
    torch.testing.assert_close(by_graph, usual, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_padded_rows(kind: str, five_layers: PreTrainedModel) -> None:
    ids, mask = prompt(120, rows=3), torch.ones(3, 120, dtype=torch.int64)
    mask[1, :50] = mask[2, :7] = 0
    of_eager, of_graph = both_ways(five_layers, KINDS[kind], ids, 14, attention_mask=mask)
    assert of_graph.graphs.replays == 12
    assert counted(of_graph) == counted(of_eager)


def test_rooms_that_grow_are_captured_anew(five_layers: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_patch.integration.caches.layers.SPARE", 4)
    results = []
    for decode_graph in ("off", "auto"):
        with patched(five_layers, QUEST, decode_graph=decode_graph):
            cache = growing_cache(five_layers.config)
            results.append(stepped(five_layers, prompt(100), 60, cache))
            report = sparsity_report(five_layers)
    assert torch.equal(*results)
    assert report.graphs.captures > 2


def test_a_threshold_that_the_text_crosses(five_layers: PreTrainedModel) -> None:
    config = {"decode": {**QUEST["decode"], "min_length": 110}}
    of_eager, of_graph = both_ways(five_layers, config, prompt(100), 30)
    assert of_graph.graphs.captures == 2, "one dense, one sparse"
    assert counted(of_graph) == counted(of_eager)
    assert 0 < of_graph.layers[0].decode.sparse_calls < 29


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_prompt_and_a_continued_chat(kind: str, five_layers: PreTrainedModel) -> None:
    results = []
    for decode_graph in ("off", "auto"):
        with patched(five_layers, KINDS[kind], decode_graph=decode_graph):
            logits = [generated(five_layers, prompt(90), 12), generated(five_layers, prompt(130, rows=2, seed=1), 12)]
            cache = span_cache(five_layers, 200)
            chat = prompt(80)
            for turn in range(3):
                with torch.no_grad():
                    answer = five_layers.generate(
                        chat,
                        past_key_values=cache,
                        max_new_tokens=11,
                        do_sample=False,
                        return_dict_in_generate=True,
                        output_logits=True,
                    )
                logits.append(torch.stack(answer.logits, 1))
                chat = torch.cat([answer.sequences, prompt(9, seed=turn)], 1)
            results.append(logits)
            report = sparsity_report(five_layers)
    assert all(map(torch.equal, *results))
    assert report.graphs.captures >= 3


def test_two_interleaved_generations(five_layers: PreTrainedModel) -> None:
    prompts = prompt(100), prompt(140, seed=1)
    with patched(five_layers, QUEST, decode_graph="off"):
        expected = [stepped(five_layers, ids, 20) for ids in prompts]
    with patched(five_layers, QUEST), torch.no_grad():
        caches = [growing_cache(five_layers.config) for _ in prompts]
        of_prompts = zip(prompts, caches, strict=True)
        logits = [[five_layers(input_ids=ids, past_key_values=cache).logits[:, -1]] for ids, cache in of_prompts]
        for _ in range(19):
            for cache, seen in zip(caches, logits, strict=True):
                token = seen[-1].argmax(-1, keepdim=True)
                seen.append(five_layers(input_ids=token, past_key_values=cache).logits[:, -1])
        assert sparsity_report(five_layers).graphs.captures == 2
    for seen, alone in zip(logits, expected, strict=True):
        assert torch.equal(torch.stack(seen, 1), alone)


def test_two_patched_models() -> None:
    first, second = llama(), llama(layers=2)
    patch_model(first, QUEST)
    patch_model(second, SPANS)
    mine = [generated(first, prompt(100), 14), generated(second, prompt(100), 14)]
    for model, config, logits in zip((first, second), (QUEST, SPANS), mine, strict=True):
        patch_model(model, config, replace=True, decode_graph="off")
        assert torch.equal(generated(model, prompt(100), 14), logits)


@pytest.mark.parametrize("kind", KINDS)
def test_threads(kind: str, five_layers: PreTrainedModel) -> None:
    prompts = [prompt(100), prompt(140, seed=1), prompt(120, rows=2, seed=2)]
    with patched(five_layers, KINDS[kind], decode_graph="off"):
        expected = [generated(five_layers, ids, 14) for ids in prompts]
    with patched(five_layers, KINDS[kind]):
        found = at_once([lambda ids=ids: generated(five_layers, ids, 14) for ids in prompts])
        report = sparsity_report(five_layers)
    assert all(map(torch.equal, found, expected))
    assert report.graphs.replays == 36
    assert all(layer.decode.calls == 39 for layer in report.layers)


def test_a_cache_that_is_cut_reordered_or_copied(five_layers: PreTrainedModel) -> None:
    def run() -> list[torch.Tensor]:
        cache, ids = growing_cache(five_layers.config), prompt(100, rows=2)
        logits = [stepped(five_layers, ids, 8, cache)]
        other = copy.deepcopy(cache)
        cache.crop(-5)
        logits.append(stepped(five_layers, ids[:, :1], 8, cache))
        cache.reorder_cache(torch.tensor([1, 1]))
        logits.append(stepped(five_layers, ids[:, :1], 8, cache))
        cache.batch_select_indices(torch.tensor([0]))
        logits.append(stepped(five_layers, ids[:1, :1], 8, cache))
        logits.append(stepped(five_layers, ids[:, :1], 8, other))
        return logits

    with patched(five_layers, QUEST, decode_graph="off"):
        expected = run()
    with patched(five_layers, QUEST):
        found = run()
        assert sparsity_report(five_layers).graphs.captures == 4, (
            "not after the cut, which leaves everything in its place"
        )
    assert all(map(torch.equal, found, expected))


def test_the_logits_of_a_step_stay_as_they_are(five_layers: PreTrainedModel) -> None:
    with patched(five_layers, QUEST), torch.no_grad():
        cache, ids = growing_cache(five_layers.config), prompt(100)
        five_layers(input_ids=ids, past_key_values=cache)
        outputs = [five_layers(input_ids=ids[:, i : i + 1], past_key_values=cache) for i in range(8)]
        kept = [output.logits.clone() for output in outputs]
        five_layers(input_ids=ids[:, :1], past_key_values=cache)
    assert all(map(torch.equal, kept, [output.logits for output in outputs]))
    assert all(output.past_key_values is cache for output in outputs)
    assert cache.get_seq_length() == 109


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_of_a_cache_is_free_at_once(kind: str, five_layers: PreTrainedModel) -> None:
    gc.collect()
    gc.disable()
    try:
        with patched(five_layers, KINDS[kind]):
            cache = span_cache(five_layers, 140)
            stepped(five_layers, prompt(100), 12, cache)
            kept = [ref(x.untyped_storage()) for layer in cache.layers for x in (layer.keys, layer.values)]
            kept.append(ref(cache))
            del cache
            assert [x() for x in kept] == [None] * len(kept)
            assert sparsity_report(five_layers).graphs.replays == 10
    finally:
        gc.enable()


def test_a_cache_that_outlives_its_model_does_not_keep_it() -> None:
    model = patch_model(llama(), QUEST)
    cache = span_cache(model, 140)
    stepped(model, prompt(100), 12, cache)
    assert sparsity_report(model).graphs.replays == 10
    module = ref(model.lm_head)
    del model
    gc.collect()
    assert module() is None
    assert cache.get_seq_length() == 111


def test_the_report_starts_again(five_layers: PreTrainedModel) -> None:
    with patched(five_layers, QUEST), torch.no_grad():
        cache, ids = growing_cache(five_layers.config), prompt(100)
        stepped(five_layers, ids, 8, cache)
        before = sparsity_report(five_layers)
        assert counted(sparsity_report(five_layers)) == counted(before), "reading changes nothing"
        reset_report(five_layers)
        stepped(five_layers, ids[:, :1], 5, cache)
        after = sparsity_report(five_layers)
    assert before.layers[0].decode.calls == 7
    assert after.layers[0].decode.calls == 5
    assert after.graphs.replays == 5


def test_short_answers_are_not_captured(five_layers: PreTrainedModel) -> None:
    with patched(five_layers, QUEST):
        generated(five_layers, prompt(100), 4)
        assert sparsity_report(five_layers).graphs.captures == 0


def test_inference_mode(five_layers: PreTrainedModel) -> None:
    with patched(five_layers, QUEST, decode_graph="off"):
        expected = generated(five_layers, prompt(100), 14)
    with patched(five_layers, QUEST):
        with torch.inference_mode():
            first = generated(five_layers, prompt(100), 14)
            cache = growing_cache(five_layers.config)
            stepped(five_layers, prompt(100), 8, cache)
        stepped(five_layers, prompt(1), 8, cache)  # goes on outside
        assert sparsity_report(five_layers).graphs.captures == 2
    assert torch.equal(first, expected)
