"""The lm-eval model: agreement with stock `hf`, refusals, and the content of the results, without a network."""

from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from builders.lm_eval_tasks import SPARSE, model, offline_tasks, own_tasks, requests
from families import gemma2, llama
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from sparse_patch import ConfigError, TaskError, patch_model, sparsity_report
from sparse_patch.evaluation.lm_eval import SparseLM
from sparse_patch.evaluation.lm_eval.hidden_states import HiddenStates, answering
from sparse_patch.integration.patch import is_patched
from sparse_patch.workbench.tasks import TASKS as OFFLINE


@pytest.fixture(scope="module")
def generation(tokenizer: Any) -> list[Instance]:
    """Prompts of four lengths, so that batches are padded."""
    samples = [OFFLINE["niah_multivalue"].sample(tokenizer, length) for length in (300, 410, 520, 350)]
    return requests("generate_until", [(sample.prompt, {"until": ["."], "max_gen_toks": 40}) for sample in samples])


@pytest.fixture(scope="module")
def choices(tokenizer: Any) -> list[Instance]:
    """Four choices of several tokens for each prompt, and choices of one token that share a row."""
    rows = []
    for index, length in enumerate((300, 420, 360)):
        sample = OFFLINE["niah_single_2"].sample(tokenizer, length, index=index)
        rows += [(sample.prompt, text) for text in (sample.answer, " 1111111", " 42", " the grass")]
        rows += [(sample.prompt, text) for text in (" A", " B", " C")]
    return requests("loglikelihood", rows)


@pytest.mark.parametrize("batch", [1, 4])
def test_the_dense_row_is_that_of_stock_hf(
    path: str, generation: list[Instance], choices: list[Instance], batch: int
) -> None:
    stock = HFLM(pretrained=path, dtype="float32", batch_size=batch, device="cpu")
    ours = SparseLM(path, "dense.yaml", dtype="float32", batch_size=batch)
    assert ours.generate_until(generation) == stock.generate_until(generation)
    for (ours_log, ours_greedy), (stock_log, stock_greedy) in zip(
        ours.loglikelihood(choices), stock.loglikelihood(choices), strict=True
    ):
        assert ours_greedy == stock_greedy and ours_log == pytest.approx(stock_log, abs=2e-3, rel=1e-5)
    rolling = requests("loglikelihood_rolling", [(text.args[0][:900],) for text in generation[:2]])
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(stock.loglikelihood_rolling(rolling), rel=1e-5)


@pytest.mark.parametrize("batch", [1, 4])
def test_whole_evaluations_agree(path: str, tmp_path: Path, batch: int) -> None:
    """The same tasks through lm-eval's front door: a generating one and a multiple-choice one."""
    folder = own_tasks(tmp_path, number=6)
    results = []
    for name, extra in (("hf", {}), ("hf-sparse", {"config": "dense.yaml"})):
        manager = offline_tasks(path, folder)
        output = lm_eval.simple_evaluate(
            model=name,
            model_args={"pretrained": path, "dtype": "float32", **extra},
            tasks=["needle_niah_single_2", "own_choice"],
            task_manager=manager,
            batch_size=batch,
            device="cpu",
            bootstrap_iters=0,
        )
        results.append(output)
    assert results[0]["results"] == results[1]["results"]
    for task, samples in results[0]["samples"].items():
        for stock, ours in zip(samples, results[1]["samples"][task], strict=True):
            if task == "needle_niah_single_2":
                assert ours["resps"] == stock["resps"]


def test_results_say_what_ran_for_a_patched_model(path: str, tokenizer: Any) -> None:
    """As in a notebook: the model is already patched, and lm-eval gets the object."""
    patched = patch_model(model(path), SPARSE)
    manager = offline_tasks(path)
    output = lm_eval.simple_evaluate(
        model=SparseLM(patched, tokenizer=tokenizer, batch_size=2),
        tasks=["needle_vt"],
        task_manager=manager,
        bootstrap_iters=0,
    )
    about = output["config"]["sparse_patch"]
    assert about["config"]["prefill"]["gamma"] == 0.6
    assert 0.1 < about["density"] < 0.95 and about["density"] == sparsity_report(patched).density()
    assert about["attended"] > 600 and about["truncated_prompts"] == 0 and about["hook_active"]
    assert output["results"]["needle_vt"]["score,none"] == output["results"]["needle_vt"]["score_640,none"]
    assert is_patched(patched)


def test_the_offline_group_and_its_exact_lengths(path: str, tokenizer: Any) -> None:
    manager = offline_tasks(path, max_seq_lengths=[1100], num_samples=1)
    tasks = manager.load(["needle"])["tasks"]
    assert len(tasks) == 8
    for name, task in tasks.items():
        task.build_all_requests(limit=None, rank=0, world_size=1)
        (request,) = task.instances
        assert len(tokenizer(request.args[0])["input_ids"]) == 1100, name
        assert request.args[0] == OFFLINE[name.removeprefix("needle_")].sample(tokenizer, 1100).prompt


def test_padding_does_not_change_a_sparse_row(path: str, choices: list[Instance]) -> None:
    """A batch of 4 unequal prompts gives the same as a batch of 1; right padding without a mask would not."""
    alone, together = (SparseLM(path, SPARSE, dtype="float32", batch_size=batch) for batch in (1, 4))
    one, four = alone.loglikelihood(choices), together.loglikelihood(choices)
    for (log_1, greedy_1), (log_4, greedy_4) in zip(one, four, strict=True):
        assert greedy_1 == greedy_4 and log_1 == pytest.approx(log_4, abs=2e-3, rel=1e-4)
    density = [lm.get_model_info()["sparse_patch"]["density"] for lm in (alone, together)]
    assert density[0] < 0.95 and density[0] == pytest.approx(density[1], abs=0.02)


def test_logits_are_made_for_scored_tokens_alone(path: str, choices: list[Instance], monkeypatch: Any) -> None:
    """The head never sees more tokens than are scored, and a small budget gives the same sums."""
    lm = SparseLM(path, "dense.yaml", dtype="float32", batch_size=4)
    sizes: list[int] = []
    head = lm.model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: sizes.append(inputs[0].shape[:2].numel()))
    whole = lm.loglikelihood(choices)
    assert max(sizes) <= 12, "tokens of the longest choice"
    sizes.clear()
    monkeypatch.setattr("sparse_patch.evaluation.lm_eval.model._LOGITS_BYTES", 4 * 4096 * 2)
    for (log_1, greedy_1), (log_2, greedy_2) in zip(whole, lm.loglikelihood(choices), strict=True):
        assert greedy_1 == greedy_2 and log_1 == pytest.approx(log_2, rel=1e-5)
    assert max(sizes) == 2


@pytest.mark.parametrize("family", [llama, gemma2])
def test_the_models_own_head_is_used(family: Any) -> None:
    """Soft caps after the last layer are part of the logits."""
    tiny = family()
    ids = torch.randint(3, 90, (2, 20))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = tiny(input_ids=ids, attention_mask=mask).logits
        read = HiddenStates(tiny, ids, mask)
        part = read.logits(slice(1, 2), slice(5, 9))
        assert torch.allclose(part, expected[1:2, 5:9], atol=1e-5)
        assert torch.equal(tiny(input_ids=ids, attention_mask=mask).logits, expected), "the decoder is itself again"
    with pytest.raises(RuntimeError), answering(tiny.base_model, None):
        raise RuntimeError
    assert "forward" not in vars(tiny.base_model)


def test_a_prompt_that_is_too_long_stops_the_run_before_it_starts(path: str, generation: list[Instance]) -> None:
    lm = SparseLM(path, "dense.yaml", dtype="float32", max_length=500)
    with pytest.raises(TaskError) as error:
        lm.generate_until(generation)
    assert str(error.value).startswith(
        "hf-sparse: task: 520 tokens do not fit, the model's context of 500 leaves 460; "
    )
    assert sparsity_report(lm.model).density() is None, "nothing ran"
    with pytest.raises(TaskError, match="tokens do not fit, the model's context of 500 leaves 501"):
        lm.loglikelihood(requests("loglikelihood", [("a b " * 800, " c")]))


def test_truncation_is_asked_for_and_counted(path: str, generation: list[Instance]) -> None:
    lm = SparseLM(path, "dense.yaml", dtype="float32", max_length=500, truncation=True)
    assert len(lm.generate_until(generation)) == 4
    lm.loglikelihood(requests("loglikelihood", [("a b " * 800, " c")]))
    assert lm.get_model_info()["sparse_patch"]["truncated_prompts"] == 2


def test_trials_of_batch_sizes_are_not_reported(path: str, choices: list[Instance]) -> None:
    lm = SparseLM(path, SPARSE, dtype="float32", batch_size="auto", max_batch_size=2, max_length=600)
    automatic = lm.loglikelihood(choices)
    fixed = SparseLM(path, SPARSE, dtype="float32", batch_size=2)
    expected = fixed.loglikelihood(choices)
    assert [greedy for _, greedy in automatic] == [greedy for _, greedy in expected]
    for layers in zip(sparsity_report(lm.model).layers, sparsity_report(fixed.model).layers, strict=True):
        assert layers[0].prefill.pairs == layers[1].prefill.pairs


def test_configuration_is_needed_once(path: str, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"hf-sparse: config: missing; add config=flexprefill.yaml, or config=dense"):
        SparseLM(path)
    with pytest.raises(ConfigError, match=r"no-such.yaml: no such file"):
        SparseLM("no-such-model", "no-such.yaml")
    with pytest.raises(ConfigError, match="the model is patched already; leave it out"):
        SparseLM(patch_model(model(path), SPARSE), "dense.yaml", tokenizer=tokenizer)
    lm = SparseLM(model(path), "dense.yaml", tokenizer=tokenizer)
    assert lm.get_model_info()["sparse_patch"]["source"] == "dense.yaml"
