"""The lm-eval model: what stock `hf` gives, what it must refuse, what the results say. No network."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from commands import run
from families import gemma2, llama
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sparse_patch import ConfigError, SparsePatchError, TaskError, patch_model, sparsity_report
from sparse_patch.evaluation.lm_eval import TASKS, SparseLM, _answering, _Read, _results_in, main
from sparse_patch.evaluation.tasks import TASKS as OFFLINE
from sparse_patch.patching import is_patched
from sparse_patch.writing import WriteError

SPARSE = {"prefill": {"method": "flexprefill", "block_size": 32, "min_budget": 64, "min_length": 256, "gamma": 0.6}}


@pytest.fixture(scope="module")
def path(needle_llama_path: Path) -> str:
    return str(needle_llama_path)


@pytest.fixture(scope="module")
def tokenizer(path: str) -> Any:
    return AutoTokenizer.from_pretrained(path)


def model(path: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=number, metadata=("task", number, 1))
        for number, args in enumerate(arguments)
    ]


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


def offline_tasks(path: str, *folders: Path, **metadata: Any) -> TaskManager:
    """The packaged tasks and some folders, without lm-eval's own thousands, which take long to list."""
    known = {"max_seq_lengths": [640], "num_samples": 4, "tokenizer": path, **metadata}
    return TaskManager(include_path=[TASKS, *folders], include_defaults=False, metadata=known)


def own_tasks(folder: Path, number: int = 4) -> Path:
    """A user's own tasks: YAML files on a local JSON file."""
    folder = folder / "mine"
    folder.mkdir()
    words = ["green", "blue", "yellow"]
    lines = [
        {
            "question": f"The grass is green. The sky is blue. The sun is yellow. {text}",
            "choices": words,
            "label": label,
        }
        for text, label in [("The grass is", 0), ("The sky is", 1), ("The sun is", 2)] * (number // 3 + 1)
    ][:number]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}}}\ntest_split: test\n"
    (folder / "own_choice.yaml").write_text(
        f"task: own_choice\n{data}output_type: multiple_choice\ndoc_to_text: question\n"
        "doc_to_choice: choices\ndoc_to_target: label\nmetric_list: [{metric: acc}]\nmetadata: {version: 1.0}\n"
    )
    (folder / "own_generate.yaml").write_text(
        f"task: own_generate\n{data}output_type: generate_until\ndoc_to_text: question\n"
        'doc_to_target: "{{choices[label]}}"\ngeneration_kwargs: {until: ["."], max_gen_toks: 8}\n'
        "metric_list: [{metric: exact_match}]\nmetadata: {version: 1.0}\n"
    )
    return folder


def test_a_task_of_the_users_own_runs_offline_from_the_command_line(path: str, tmp_path: Path) -> None:
    folder, config = own_tasks(tmp_path), "flexprefill.yaml"
    command = [sys.executable, "-m", "sparse_patch.cli", "lm-eval", "--model", "hf-sparse", "--model_args"]
    command += [f"pretrained={path},config={config},dtype=float32", "--tasks", "own_choice,own_generate"]
    command += ["--include_path", str(folder), "--output_path", str(tmp_path / "out"), "--batch_size", "2"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    about = json.loads(file.read_text())["config"]["sparse_patch"]
    assert about["source"] == config and len(about["config_hash"]) == 12
    assert about["density"] == 1.0 and about["attended"] > 1 and about["fallbacks"] == {}
    assert set(about["versions"]) == {"sparse_patch", "torch", "transformers"}
    assert "own_choice" in result.stdout


def test_results_say_what_ran_for_a_patched_model(path: str, tokenizer: Any) -> None:
    """A notebook: the model is patched already, lm-eval gets the object."""
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
    """Batch 4 of unequal prompts gives what batch 1 gives, which right padding without a mask would not."""
    alone, together = (SparseLM(path, SPARSE, dtype="float32", batch_size=batch) for batch in (1, 4))
    one, four = alone.loglikelihood(choices), together.loglikelihood(choices)
    for (log_1, greedy_1), (log_4, greedy_4) in zip(one, four, strict=True):
        assert greedy_1 == greedy_4 and log_1 == pytest.approx(log_4, abs=2e-3, rel=1e-4)
    density = [lm.get_model_info()["sparse_patch"]["density"] for lm in (alone, together)]
    assert density[0] < 0.95 and density[0] == pytest.approx(density[1], abs=0.02)


def test_logits_are_made_for_scored_tokens_alone(path: str, choices: list[Instance], monkeypatch: Any) -> None:
    """No forward of the head sees more tokens than are scored, and a small budget gives the same sums."""
    lm = SparseLM(path, "dense.yaml", dtype="float32", batch_size=4)
    sizes: list[int] = []
    head = lm.model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: sizes.append(inputs[0].shape[:2].numel()))
    whole = lm.loglikelihood(choices)
    assert max(sizes) <= 12, "tokens of the longest choice"
    sizes.clear()
    monkeypatch.setattr("sparse_patch.evaluation.lm_eval._LOGITS_BYTES", 4 * 4096 * 2)
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
        read = _Read(tiny, ids, mask)
        part = read.logits(slice(1, 2), slice(5, 9))
        assert torch.allclose(part, expected[1:2, 5:9], atol=1e-5)
        assert torch.equal(tiny(input_ids=ids, attention_mask=mask).logits, expected), "the decoder is itself again"
    with pytest.raises(RuntimeError), _answering(tiny.base_model, None):
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


SHORT = 128  # tokens of the context that the edges are about


def text_of(tokenizer: Any, tokens: int, begin: int = 1) -> str:
    """A text of that many tokens, the one that is put in front counted."""
    ids = tokenizer(OFFLINE["niah_single_2"].sample(tokenizer, 400).prompt)["input_ids"]
    return str(tokenizer.decode(ids[begin : begin + tokens - 1]))


def edge_requests(tokenizer: Any) -> list[tuple[str, tuple[Any, ...]]]:
    """Requests at the edges of what stock `hf` answers."""
    exact, long = text_of(tokenizer, 100), text_of(tokenizer, 300)
    end = tokenizer.decode([tokenizer.eos_token_id])
    return [
        ("generate_until", (exact, {"until": ["\n"], "max_gen_toks": SHORT - 100})),
        ("generate_until", ("", {"until": ["\n"], "max_gen_toks": 4})),
        ("generate_until", ("The grass is", {"until": [], "max_gen_toks": 4})),
        ("generate_until", ("The grass is", {"until": "", "max_gen_toks": 4})),
        ("generate_until", ("The grass is", {"max_gen_toks": 4})),
        ("generate_until", ("", {"until": ["."], "max_gen_toks": SHORT - 1})),
        ("generate_until", ("The grass is", {"max_gen_toks": 300, "max_length": 20})),
        ("loglikelihood", ("", " green")),
        ("loglikelihood", (" ", "green")),
        ("loglikelihood", ("The grass is ", "green")),
        ("loglikelihood", (" ", "")),
        ("loglikelihood", ("", end)),
        ("loglikelihood", (text_of(tokenizer, SHORT), text_of(tokenizer, 2, begin=SHORT))),
        ("loglikelihood", ("The", text_of(tokenizer, SHORT, begin=2))),
        ("loglikelihood", ("The", long)),
        ("loglikelihood", ("The grass", "")),
        ("loglikelihood", ("", "")),
        ("loglikelihood_rolling", ("",)),
        ("loglikelihood_rolling", (text_of(tokenizer, SHORT),)),
        ("loglikelihood_rolling", (text_of(tokenizer, SHORT + 1),)),
        ("loglikelihood_rolling", (long,)),
    ]


@pytest.mark.parametrize("cut", [False, True], ids=["refuses", "truncates"])
def test_edges_are_those_of_stock_hf_or_one_line(path: str, tokenizer: Any, cut: bool) -> None:
    """Each alone, and those that stock answers together in a batch, an empty one among them."""
    stock = HFLM(model(path), tokenizer=tokenizer, batch_size=3, max_length=SHORT, device="cpu")
    ours = SparseLM(model(path), "dense.yaml", tokenizer=tokenizer, batch_size=3, max_length=SHORT, truncation=cut)
    answered: dict[str, list[tuple[Any, ...]]] = {}
    for kind, arguments in edge_requests(tokenizer):
        try:
            expected = getattr(stock, kind)(requests(kind, [arguments]))
        except Exception:
            with pytest.raises(TaskError, match=r"^hf-sparse: .+; ") as error:
                getattr(ours, kind)(requests(kind, [arguments]))
            assert len(str(error.value)) < 500 and "\n" not in str(error.value)
            continue
        answered.setdefault(kind, []).append(arguments)
        same(getattr(ours, kind)(requests(kind, [arguments])), expected)
    assert {kind: len(rows) for kind, rows in answered.items()} == {
        "generate_until": 6,
        "loglikelihood": 7,
        "loglikelihood_rolling": 4,
    }
    for kind, rows in answered.items():
        same(getattr(ours, kind)(requests(kind, rows)), getattr(stock, kind)(requests(kind, rows)))
        assert getattr(ours, kind)([]) == []


def same(ours: list[Any], stock: list[Any]) -> None:
    for one, other in zip(ours, stock, strict=True):
        if isinstance(one, tuple):
            assert one[1] == other[1] and one[0] == pytest.approx(other[0], abs=2e-3, rel=1e-5)
        else:
            assert one == other if isinstance(one, str) else one == pytest.approx(other, abs=1e-3, rel=1e-5)


NO_ROOM = r"asks for (\d+) new tokens, which leave no room .* context of 128; ask for fewer: --gen_kwargs max_gen_toks="


@pytest.fixture(scope="module")
def dense(path: str) -> PreTrainedModel:
    return patch_model(model(path), "dense.yaml")


@pytest.mark.parametrize("asked", [{"max_gen_toks": 300}, {"max_new_tokens": SHORT}, {}, {"max_gen_toks": 0}])
@pytest.mark.parametrize("cut", [False, True], ids=["refuses", "truncates"])
@pytest.mark.parametrize("tokens", [5, 60, 200])
def test_the_advice_works_when_it_is_followed(
    dense: PreTrainedModel, tokenizer: Any, asked: dict[str, int], cut: bool, tokens: int
) -> None:
    """More new tokens than the context has: what the message says to pass is what then runs."""
    prompts = [text_of(tokenizer, 5), text_of(tokenizer, tokens)]
    lm = SparseLM(dense, tokenizer=tokenizer, batch_size=1, max_length=SHORT, truncation=cut)
    with pytest.raises(TaskError) as error:
        lm.generate_until(requests("generate_until", [(prompt, {"until": ["."], **asked}) for prompt in prompts]))
    message = str(error.value)
    assert len(message.splitlines()) == 1 and "leaves -" not in message
    if asked == {"max_gen_toks": 0}:
        assert message == "hf-sparse: task: asks for 0 new tokens; ask for 1 or more: --gen_kwargs max_gen_toks=1"
    else:
        assert re.search(NO_ROOM, message), message
        assert ("truncation=True" in message) == (tokens > SHORT)
    (most,) = re.findall(r"max_gen_toks=(\d+)", message)
    lm = SparseLM(dense, tokenizer=tokenizer, batch_size=1, max_length=SHORT, truncation=cut or tokens > SHORT)
    followed = [(prompt, {"until": [" "], **asked, "max_gen_toks": int(most)}) for prompt in prompts]
    assert len(lm.generate_until(requests("generate_until", followed))) == 2


def test_settings_of_the_generation_that_mean_nothing(dense: PreTrainedModel, tokenizer: Any) -> None:
    lm = SparseLM(dense, tokenizer=tokenizer, max_length=SHORT)
    for settings, message in (
        ({"max_gen_toks": "many"}, "task: generation_kwargs: invalid literal for int"),
        ({"until": [None]}, r"task: until: expected texts, got \[None\]; leave it out for none"),
        ({"max_length": 3, "max_gen_toks": 4}, "task: max_length of 3 leaves no room after a prompt of 5 tokens; give"),
    ):
        with pytest.raises(TaskError, match=message):
            lm.generate_until(requests("generate_until", [("The grass is", settings)]))


def test_choices_that_share_a_row_are_scored_where_they_stand(dense: PreTrainedModel, tokenizer: Any) -> None:
    """The same tokens, cut into context and continuation at several places."""
    lm = SparseLM(dense, tokenizer=tokenizer, batch_size=4)
    rows = [("The grass", " is green"), ("The grass is", " green"), ("The", " grass is green")]
    together = [answer for answer, _ in lm.loglikelihood(requests("loglikelihood", rows))]
    alone = [lm.loglikelihood(requests("loglikelihood", [row]))[0][0] for row in rows]
    assert together == pytest.approx(alone, abs=1e-4) and together[1] > together[0] > together[2]


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


TASK = ["--tasks", "needle_vt", "--metadata"]
BAD_ARGUMENTS = [
    (
        ["--tasks"],
        "lm-eval: argument --tasks/-t: expected at least one argument; see `sparse-patch lm-eval run --help`",
    ),
    (["--limit", "x"], "lm-eval: argument --limit/-L: invalid float value: 'x'; see `sparse-patch lm-eval run --help`"),
    (["--bogus"], "lm-eval: unrecognized arguments: --bogus; see "),
    ([*TASK, '{"max_seq_lengths": "x"}'], "needle_vt: metadata: max_seq_lengths: expected 1 or more, got ['x']"),
    (
        [*TASK, '{"max_seq_lengths": [512, 0]}'],
        "needle_vt: metadata: max_seq_lengths: expected 1 or more, got [512, 0]",
    ),
    ([*TASK, '{"max_seq_lengths": []}'], "needle_vt: metadata: max_seq_lengths: expected 1 or more, got []"),
    ([*TASK, '{"num_samples": -1}'], "needle_vt: metadata: num_samples: expected 1 or more, got [-1]"),
    ([*TASK, '{"num_samples": true}'], "needle_vt: metadata: num_samples: expected 1 or more, got [True]"),
]


@pytest.mark.parametrize("arguments, message", BAD_ARGUMENTS, ids=[row[1][9:40] for row in BAD_ARGUMENTS])
def test_arguments_that_lm_eval_does_not_take(
    path: str, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))  # which take long
    with pytest.raises(TaskError) as error:
        main(["--model", "hf-sparse", "--model_args", f"pretrained={path},config=dense", *arguments])
    assert str(error.value).startswith(message) and "usage:" not in capsys.readouterr().err


BAD = [
    (["--tasks", "no_such_task"], "error: lm-eval: "),
    (
        ["--tasks", "needle_vt", "--include_path", "no/such/folder"],
        "error: --include_path: no/such/folder: is not a folder",
    ),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=["task", "include_path"])
def test_bad_arguments_are_one_line(path: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    command = ["lm-eval", "--model", "hf-sparse", "--model_args", f"pretrained={path},config=dense.yaml", *arguments]
    result = run(*command, "--output_path", str(tmp_path / "out"), cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith(message), result.stderr
    assert "Traceback" not in result.stderr and not list(tmp_path.rglob("results_*.json"))


def test_results_that_cannot_be_written(path: str, tmp_path: Path) -> None:
    """Seen before the run if it can be; lm-eval itself only logs that it failed."""
    (tmp_path / "file").write_text("no folder")
    arguments = ["--model", "hf-sparse", "--model_args", f"pretrained={path},config=dense", "--tasks", "needle_vt"]
    for output in (tmp_path / "file", tmp_path / "file" / "deep" / "r.json"):
        with pytest.raises(WriteError, match=rf"^--output_path: {output}: cannot be written: .* is not a folder$"):
            main([*arguments, "--output_path", str(output)])
    unwritten = pytest.raises(WriteError, match="out: no results could be written; the table above")
    with unwritten, _results_in(str(tmp_path / "out")):
        pass
    with _results_in(str(tmp_path / "out")):
        (tmp_path / "out" / "model").mkdir(parents=True)
        (tmp_path / "out" / "model" / "results_1.json").touch()


def test_models_that_cannot_be_loaded(tmp_path: Path) -> None:
    for name, message in (("no-such-model", "no such folder"), (str(tmp_path), "has no config.json")):
        with pytest.raises(SparsePatchError, match=rf"^hf-sparse: pretrained: {name}: cannot be loaded: {message}"):
            SparseLM(name, "dense.yaml")


def test_prompts_that_cannot_be_made_or_read(path: str) -> None:
    with pytest.raises(TaskError, match="vt: the length is too short for what is hidden"):
        offline_tasks(path, max_seq_lengths=100).load(["needle_vt"])
    with pytest.raises(SparsePatchError, match="tokenizer: no-such-model: cannot be loaded"):
        offline_tasks("no-such-model").load(["needle_vt"])
    with pytest.raises(TaskError, match=r"hf-sparse: needle_vt: 32760 tokens do not fit, the model's context of 32768"):
        lm_eval.simple_evaluate(
            model=SparseLM(path, "dense.yaml"),
            tasks=["needle_vt"],
            task_manager=offline_tasks(path, max_seq_lengths=32760, num_samples=1),
        )


def test_data_parallel_under_accelerate(path: str, tmp_path: Path) -> None:
    """Two processes share the prompts; scores and counts are those of one."""
    outputs = []
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    config = tmp_path / "sparse.yaml"
    config.write_text(json.dumps(SPARSE))
    for number, prefix in enumerate(([sys.executable], launch)):
        folder = tmp_path / str(number)
        command = [
            *prefix,
            "-m",
            "sparse_patch.cli",
            "lm-eval",
            "--model",
            "hf-sparse",
            "--tasks",
            "needle_vt",
        ]
        command += ["--model_args", f"pretrained={path},config={config},dtype=float32", "--output_path", str(folder)]
        command += ["--metadata", '{"max_seq_lengths": [640], "num_samples": 3}']
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr[-3000:]
        (file,) = folder.rglob("results_*.json")
        outputs.append(json.loads(file.read_text()))
    one, two = outputs
    assert one["results"]["needle_vt"]["score,none"] == two["results"]["needle_vt"]["score,none"]
    about = [output["config"]["sparse_patch"] for output in outputs]
    # lm-eval gives both ranks as many requests, so one of the three runs twice.
    assert about[0]["density"] == pytest.approx(about[1]["density"], abs=0.03)
    assert about[1]["fallbacks"] == {} and about[1]["attended"] == pytest.approx(about[0]["attended"], rel=0.02)
