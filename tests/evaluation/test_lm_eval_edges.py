"""Requests at the edges of the model's context: answered as by stock hf, or refused in one line with a way out."""

import re
from typing import Any

import pytest
from builders.lm_eval_tasks import model, requests
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from sparse_patch import TaskError, patch_model
from sparse_patch.evaluation.lm_eval import SparseLM
from sparse_patch.workbench.tasks import TASKS as OFFLINE

SHORT = 128  # tokens of the context whose edges are tested


def text_of(tokenizer: Any, tokens: int, begin: int = 1) -> str:
    """A text of `tokens` tokens, including the one that the tokenizer puts in front."""
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
    """Run each request by itself, and all that stock hf answers in one batch, an empty request among them."""
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
    """If more new tokens are asked for than the context has, the arguments that the message advises work."""
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
    """The same tokens are split into context and continuation at several places."""
    lm = SparseLM(dense, tokenizer=tokenizer, batch_size=4)
    rows = [("The grass", " is green"), ("The grass is", " green"), ("The", " grass is green")]
    together = [answer for answer, _ in lm.loglikelihood(requests("loglikelihood", rows))]
    alone = [lm.loglikelihood(requests("loglikelihood", [row]))[0][0] for row in rows]
    assert together == pytest.approx(alone, abs=1e-4) and together[1] > together[0] > together[2]
