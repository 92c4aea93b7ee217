"""The offline tasks: exact lengths for any tokenizer, answers that are in the text, and one sample per seed."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import byte_fallback_bpe, unigram
from transformers import AutoTokenizer

from sparse_patch.errors import TaskError
from sparse_patch.evaluation.document import needle_document
from sparse_patch.workbench.generation import encode
from sparse_patch.workbench.prompts import default_haystack, read_haystack
from sparse_patch.workbench.tasks import SUITES, TASKS, NeedleTask, Sample, export_jsonl, tasks_of


@pytest.fixture(scope="module")
def tokenizer(needle_llama_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(needle_llama_path)


def make(tokenizer: Any, task: str, length: int = 2048, **settings: Any) -> Sample:
    return TASKS[task].sample(tokenizer, length, **settings)


@pytest.mark.parametrize("name", TASKS)
def test_a_prompt_has_exactly_the_length(tokenizer: Any, name: str) -> None:
    kinds: dict[str, Callable[[], Any]] = {
        "needle-llama": lambda: tokenizer,
        "byte-fallback BPE": byte_fallback_bpe,
        "unigram": unigram,
    }
    for kind, load in kinds.items():
        counter = load()
        for index, length in enumerate((1800, 2048, 3001, 4097)):
            sample = make(counter, name, length, index=index)
            assert len(counter(sample.prompt)["input_ids"]) == length == sample.length, (kind, length)


def test_a_haystack_in_another_script_and_bytes_that_fall_back(tokenizer: Any, tmp_path: Path) -> None:
    """A character of three bytes is three tokens, so most cuts miss the length, but one does not."""
    file = tmp_path / "hay.txt"
    file.write_text("这是一个很长的句子,里面什么都没有。 Ein Satz für Ölgemälde. 😀 " * 600, encoding="utf-8")
    hay = read_haystack(file)
    for counter in (tokenizer, byte_fallback_bpe(), unigram()):
        for index in range(4):
            sample = make(counter, "niah_multikey_1", 1500, index=index, haystack=hay)
            assert len(counter(sample.prompt)["input_ids"]) == 1500
            assert "这是一个" in sample.input


NEEDLE = re.compile(r" One of the special magic (\w+) for ([\w-]+) is: ([\w-]+)\.")


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if isinstance(task, NeedleTask)])
def test_needles_hold_the_answer_and_stand_after_sentence_ends(tokenizer: Any, name: str) -> None:
    task = TASKS[name]
    assert isinstance(task, NeedleTask)
    for index in range(5):
        sample = make(tokenizer, name, index=index)
        found = [(match["key"], match["value"]) for match in re.finditer(NEEDLE_GROUPS, sample.input)]
        asked = re.findall(r"for (.+?) mentioned", sample.gen_prefix)[0]
        values = [value for key, value in found if key in asked]
        assert sorted(values) == sorted(sample.outputs)
        assert len(values) == task.num_values * task.num_queries
        if task.num_queries == 1:
            assert values == sample.outputs, "the values of one key are listed in the order of the text"
        assert all(value in sample.answer for value in values)
        for match in NEEDLE.finditer(sample.input):
            before = sample.input[: match.start()].rstrip(" ")
            assert before.endswith((".", "\n", "!", "?")), before[-40:]
        assert len(found) >= task.num_keys * task.num_values
        assert (len(found) > 12) == (task.haystack == "needles")
        assert ("The grass is green" in sample.input) == (task.haystack != "text")


NEEDLE_GROUPS = r"One of the special magic \w+ for (?P<key>[\w-]+) is: (?P<value>[\w-]+)\."

KINDS = {"numbers": r"\d{7}", "words": r"[a-z]+-[a-z]+", "uuids": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"}


def test_kinds_of_keys_and_values(tokenizer: Any) -> None:
    for name in TASKS:
        task = TASKS[name]
        if isinstance(task, NeedleTask):
            sample = make(tokenizer, name)
            assert all(re.fullmatch(KINDS[task.values], value) for value in sample.outputs)
            keys = [match["key"] for match in re.finditer(NEEDLE_GROUPS, sample.input)]
            assert all(re.fullmatch(KINDS[task.keys], key) for key in keys[1:])  # the first may be cut


def test_wording_is_that_of_the_model_card(tokenizer: Any) -> None:
    one = make(tokenizer, "niah_single_2")
    assert one.prompt.startswith("Some special magic numbers are hidden within the following text. Make sure to")
    assert re.search(
        r"\nWhat is the special magic number for ([a-z-]+) mentioned in the provided text\? "
        r"The special magic number for \1 mentioned in the provided text is$",
        one.prompt,
    )
    assert re.fullmatch(r" \d{7}", one.answer)
    four = make(tokenizer, "niah_multivalue")
    assert re.search(r"What are all the special magic numbers for .* text are$", four.prompt.split("\n")[-1])
    assert re.fullmatch(r" \d{7}, \d{7}, \d{7}, and \d{7}", four.answer)


def test_variable_tracking_follows_its_chain(tokenizer: Any) -> None:
    sample = make(tokenizer, "vt")
    value = re.findall(r"assigned the value (\d{5})", sample.gen_prefix)[0]
    names = []
    for name, what in re.findall(r" VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", sample.input):
        if what == value or what in names:
            names.append(name)
    assert names == sample.outputs and len(names) == 5
    assert sample.prompt.endswith("they are: ") and sample.answer == " ".join(names)


def test_key_value_retrieval_is_a_json_object(tokenizer: Any) -> None:
    sample = make(tokenizer, "kv_retrieval")
    data = json.loads(sample.input[sample.input.index("{") : sample.input.index("}") + 1])
    key = re.findall(r'Key: "(.+)"', sample.input)[0]
    assert sample.outputs == [data[key]] and sample.answer == f' "{data[key]}"'
    assert len(data) > 10 and sample.prompt.endswith('"\nCorresponding value:')


def test_recite_lists_every_needle_in_order(tokenizer: Any) -> None:
    sample = make(tokenizer, "recite")
    found = [f"{match['key']}: {match['value']}" for match in re.finditer(NEEDLE_GROUPS, sample.input)]
    assert found == sample.outputs and len(found) == 17
    assert sample.max_new_tokens > 200
    assert len(make(tokenizer, "recite", 600).outputs) == 5
    assert len(make(tokenizer, "recite", 9000).outputs) == 64
    assert sample.answer == "".join(f"\n{line}" for line in found)
    assert sample.gen_prefix == "" and sample.prompt == sample.input


def test_a_sample_depends_on_seed_task_length_and_number_alone(tokenizer: Any) -> None:
    first = make(tokenizer, "niah_single_2", seed=1, index=3)
    make(tokenizer, "niah_single_2", seed=1, index=2)
    assert make(tokenizer, "niah_single_2", seed=1, index=3) == first
    others = [
        make(tokenizer, "niah_single_2", seed=2, index=3),
        make(tokenizer, "niah_single_2", seed=1, index=4),
        make(tokenizer, "niah_single_2", 2049, seed=1, index=3),
        make(tokenizer, "niah_multikey_1", seed=1, index=3),
    ]
    assert len({sample.outputs[0] for sample in [first, *others]}) == 5


def test_needles_stand_at_every_depth(tokenizer: Any) -> None:
    depths = []
    for index in range(24):
        sample = make(tokenizer, "niah_single_2", 1500, index=index)
        depths.append(sample.input.index(" One of the special") / len(sample.input))
    assert min(depths) < 0.25 and max(depths) > 0.75


def test_a_passage_is_copied_from_far_back(tokenizer: Any) -> None:
    depths = []
    for index in range(8):
        sample = make(tokenizer, "copy", index=index)
        place = sample.prompt.index(sample.answer)
        assert sample.prompt[place - 40 : place] == sample.prompt[-40:], "the passage begins again"
        depths.append(place / len(sample.prompt))
        prompt, answer = encode(tokenizer, sample.prompt, sample.answer)
        assert len(prompt) == 2048 and len(answer) >= sample.compared == sample.max_new_tokens == 64
        assert sample.outputs == [] and sample.prompt == sample.input
    assert min(depths) < 0.3 and max(depths) < 0.65


def test_prose_goes_on_as_the_text_does(tokenizer: Any) -> None:
    text = default_haystack()
    for index in range(4):
        sample = make(tokenizer, "prose", index=index, haystack=text)
        assert text.count(sample.prompt[-500:] + sample.answer) >= 1
        prompt, answer = encode(tokenizer, sample.prompt, sample.answer)
        assert len(prompt) == 2048 and len(answer) >= sample.compared == 64


def test_export(tokenizer: Any, tmp_path: Path) -> None:
    samples = [make(tokenizer, "vt", 1024, index=index) for index in range(3)]
    assert export_jsonl(samples, tmp_path / "vt.jsonl") == 3
    lines = [json.loads(line) for line in (tmp_path / "vt.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [sample.prompt for sample in samples]
    assert lines[1]["outputs"] == samples[1].outputs and lines[1]["length"] == 1024


def test_suites() -> None:
    assert {"niah_multikey_1", "niah_multivalue", "vt", "recite"} <= set(SUITES["needle"])
    assert SUITES["damage"] == ["copy", "prose"] == [task.name for task in tasks_of("all") if task.compared]
    assert len(SUITES["niah"]) == 8 and set(SUITES["all"]) == set(TASKS)
    assert [task.name for task in tasks_of("ruler")] == SUITES["ruler"]
    assert [task.name for task in tasks_of("needle", ["recite", "vt"])] == ["vt", "recite"]


BAD = [
    (lambda t: tasks_of("neddle"), "--suite: expected one of needle, niah, ruler, damage, all, got 'neddle'"),
    (lambda t: tasks_of("needle", ["niah_single"]), "--tasks: there is no task 'niah_single', did you mean 'niah_sing"),
    (lambda t: make(t, "niah_single_2", 50), "niah_single_2: the length is too short for what is hidden; "),
    (lambda t: make(t, "recite", 80), "recite: the length is too short for what is hidden; at least "),
    (lambda t: make(t, "niah_multikey_3", 100), "niah_multikey_3: length 100 is too short, about 2"),
    (lambda t: make(t, "vt", haystack="unused"), None),
    (lambda t: make(t, "copy", 60), "copy: the length is too short, about "),
    (lambda t: make(t, "prose", haystack="A few words. " * 20), "prose: the haystack has "),
    (lambda t: make(t, "niah_single_2", haystack="A few words. " * 20), "niah_single_2: the haystack has "),
    (lambda t: make(t, "niah_single_2", 10_000_000), "niah_single_2: the haystack has "),
    (lambda t: read_haystack("no-such-file.txt"), "--haystack: no-such-file.txt: cannot be read as UTF-8 text: "),
]


@pytest.mark.parametrize("call, message", BAD, ids=[row[1] or "noise needs no haystack" for row in BAD])
def test_what_does_not_fit_is_one_line(tokenizer: Any, call: Any, message: str | None) -> None:
    if message is None:
        call(tokenizer)
        return
    with pytest.raises(TaskError) as error:
        call(tokenizer)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_the_length_that_an_error_names_is_enough(tokenizer: Any) -> None:
    with pytest.raises(TaskError) as error:
        make(tokenizer, "niah_multikey_3", 100)
    needed = int(re.findall(r"about (\d+) tokens", str(error.value))[0])
    assert make(tokenizer, "niah_multikey_3", needed + 100).length == needed + 100


def test_document_of_the_demo(tokenizer: Any) -> None:
    document = needle_document(tokenizer, 4096, needles=8, seed=3)
    questions = [tokenizer(question.text, add_special_tokens=False)["input_ids"] for question in document.questions]
    assert len(tokenizer(document.text)["input_ids"]) + max(map(len, questions)) == 4096
    for number, (key, question) in enumerate(zip(document.keys, document.questions, strict=True)):
        needle = f" One of the special magic numbers for {key} is: {question.outputs[0]}."
        assert needle in document.text and key in question.text
        assert document.depths[number] == pytest.approx((number + 0.5) / 8, abs=0.05)
    with pytest.raises(TaskError, match="the length is too short"):
        needle_document(tokenizer, 200)
