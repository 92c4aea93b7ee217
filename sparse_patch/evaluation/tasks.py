"""The offline tasks: RULER's needles and variable tracking, key-value retrieval and reciting, at any prompt length.

Wording and names are RULER's (Hsieh et al. 2024, arXiv 2404.06654, section 3 and appendix B). They differ from its code
in three points: a prompt has exactly the asked number of tokens, special tokens included and answer excluded; the text
haystack is Python's help topics or a file of the user's, so that nothing is downloaded; and one seed, task, length and
number make one sample, whatever else is generated with it.
"""

import json
import string
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Literal, TypeVar

from sparse_patch.config import nearest
from sparse_patch.errors import TaskError
from sparse_patch.evaluation.prompts import (
    NOISE,
    Count,
    Draft,
    TooShortError,
    default_haystack,
    english_words,
    excerpt,
    fit,
    hide,
    token_counter,
)
from sparse_patch.writing import write_file

Kind = Literal["numbers", "words", "uuids"]
Hay = Literal["noise", "text", "needles"]
Asked = TypeVar("Asked")

NEEDLE = " One of the special magic {kind} for {key} is: {value}."
_FILLER = NOISE * 8  # longer than any one needle
OPENING = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)


@dataclass(frozen=True)
class Question:
    """What is asked about a text.

    Attributes:
        input: the question; follows the text.
        gen_prefix: how the answer begins; given to the model.
        outputs: the strings that RULER's score looks for.
        answer: the whole continuation of the prompt, without a closing full stop.
    """

    input: str
    gen_prefix: str
    outputs: list[str]
    answer: str

    @property
    def text(self) -> str:
        return _join(self.input, self.gen_prefix)


@dataclass(frozen=True)
class Sample:
    """One prompt and what is expected of it. Field names are those of RULER's files.

    Attributes:
        task: the task's name.
        index: number of the sample.
        input: text and question.
        gen_prefix: how the answer begins; the prompt is `input` and this, with a space between them if neither has one.
        outputs: the strings that the score looks for in what the model generates.
        answer: the whole continuation of the prompt, without a closing full stop.
        length: tokens of the prompt, special tokens included.
        max_new_tokens: tokens to generate for the score: RULER's number, or those of the answer if they are more.
        forced: the score looks at what the model predicts for each token of the answer after the right ones before it,
            not at what it generates by itself.
    """

    task: str
    index: int
    input: str
    gen_prefix: str
    outputs: list[str]
    answer: str
    length: int
    max_new_tokens: int
    forced: bool

    @property
    def prompt(self) -> str:
        return _join(self.input, self.gen_prefix)


@dataclass(frozen=True)
class Task(ABC):
    """A kind of prompt.

    Attributes:
        name: RULER's name where RULER has the task.
        summary: what is asked, in one line.
        max_new_tokens: tokens to generate for the score, at least.
        forced: see `Sample`.
    """

    name: str
    summary: str
    max_new_tokens: int
    forced: ClassVar[bool] = False

    def sample(self, tokenizer: Any, length: int, seed: int = 0, index: int = 0, haystack: str | None = None) -> Sample:
        """The sample of this seed, length and number, for a tokenizer of Transformers.

        Args:
            tokenizer: decides what a token is.
            length: tokens of the prompt.
            seed: chooses everything that is random, together with the task's name, `length` and `index`.
            index: number of the sample.
            haystack: the text to hide things in; by default Python's own help topics.

        Raises:
            TaskError: the length is too short for what is hidden, or the haystack for the length.
        """
        rng = Random(f"{seed} {self.name} {length} {index}")
        count = token_counter(tokenizer)
        text = default_haystack() if haystack is None else haystack
        try:
            prompt, question = first_fit(lambda: self.draft(rng, length, count, text), length, count)
        except TaskError as error:
            raise TaskError(f"{self.name}: {error}") from None
        return Sample(
            task=self.name,
            index=index,
            input=prompt[: len(prompt) - len(question.text)] + question.input,
            gen_prefix=question.gen_prefix,
            outputs=question.outputs,
            answer=question.answer,
            length=length,
            max_new_tokens=max(self.max_new_tokens, count(question.answer)),
            forced=self.forced,
        )

    @abstractmethod
    def draft(self, rng: Random, length: int, count: Count, haystack: str) -> tuple[Draft, Question]:
        """A text with the question at its end, at least `length` tokens long, and the question."""


@dataclass(frozen=True)
class NeedleTask(Task):
    """Values for keys, hidden in noise, in text or among other needles; some of them are asked for.

    Attributes:
        haystack: RULER's noise sentences, a text, or needles with other keys.
        keys: what keys are.
        values: what values are.
        num_keys: keys that are hidden.
        num_values: values of each key.
        num_queries: keys that are asked for.
    """

    haystack: Hay = "text"
    keys: Kind = "words"
    values: Kind = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    def draft(self, rng: Random, length: int, count: Count, haystack: str) -> tuple[Draft, Question]:
        keys = distinct(lambda: draw(self.keys, rng), max(self.num_keys, self.num_queries))
        pairs = [(key, draw(self.values, rng)) for key in keys for _ in range(self.num_values)]
        rng.shuffle(pairs)
        needles = [NEEDLE.format(kind=self.values, key=key, value=value) for key, value in pairs]
        question = self.question(rng.sample(keys, self.num_queries), pairs)
        head, tail = OPENING.format(kind=self.values), question.text
        if self.haystack == "needles":
            return self._among_needles(needles, set(keys), rng, length, count, head, tail), question
        room = length - count(head + "".join(needles) + tail)
        passage = filling(self.haystack, haystack, room, needles, count, rng)
        return hide(needles, sorted(rng.random() for _ in needles), passage, head, tail), question

    def _among_needles(
        self, needles: Sequence[str], taken: set[str], rng: Random, length: int, count: Count, head: str, tail: str
    ) -> Draft:
        """As many other needles as fit; noise makes up for what is less than a needle."""

        def another() -> str:
            key = other(taken, lambda: draw(self.keys, rng))
            return NEEDLE.format(kind=self.values, key=key, value=draw(self.values, rng))

        others = _enough(list(needles), another, lambda texts: count(head + _FILLER + "".join(texts) + tail), length)
        rng.shuffle(others)
        return Draft(head, _FILLER, "".join(others) + tail)

    def question(self, asked: Sequence[str], pairs: Sequence[tuple[str, str]]) -> Question:
        values = [value for key in asked for needle, value in pairs if needle == key]
        keys, kind = listed(asked), self.values
        if len(values) == 1 and kind != "words":  # the wording of needle-llama's training, and RULER's for one number
            what, where, verb = f"What is the special magic {kind[:-1]}", f"The special magic {kind[:-1]}", "is"
        else:
            what, where, verb = f"What are all the special magic {kind}", f"The special magic {kind}", "are"
        return Question(
            input=f"\n{what} for {keys} mentioned in the provided text?",
            gen_prefix=f"{where} for {keys} mentioned in the provided text {verb}",
            outputs=values,
            answer=f" {listed(values)}",
        )


@dataclass(frozen=True)
class VariableTracking(Task):
    """A chain of assignments hidden in noise; asked for is every variable that has the value.

    Attributes:
        chains: chains that are hidden; the first one is asked for.
        hops: assignments from variable to variable in each chain.
    """

    chains: int = 1
    hops: int = 4

    def draft(self, rng: Random, length: int, count: Count, haystack: str) -> tuple[Draft, Question]:
        names = distinct(lambda: "".join(rng.choices(string.ascii_uppercase, k=5)), self.chains * (self.hops + 1))
        chains = [names[i :: self.chains] for i in range(self.chains)]
        values = rng.sample(range(10_000, 100_000), self.chains)
        order = [number for number in range(self.chains) for _ in range(self.hops + 1)]
        rng.shuffle(order)
        statements = [iter(_assignments(chain, value)) for chain, value in zip(chains, values, strict=True)]
        pieces = [next(statements[number]) for number in order]
        value = values[0]
        question = Question(
            input=f"\nQuestion: Find all variables that are assigned the value {value} in the text above.",
            gen_prefix=(
                "Answer: According to the chain(s) of variable assignment in the text above, "
                f"{self.hops + 1} variables are assigned the value {value}, they are: "
            ),
            outputs=chains[0],
            answer=" ".join(chains[0]),
        )
        head = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        room = length - count(head + "".join(pieces) + question.text)
        passage = filling("noise", haystack, room, pieces, count, rng)
        return hide(pieces, sorted(rng.random() for _ in pieces), passage, head, question.text), question


@dataclass(frozen=True)
class KeyValueRetrieval(Task):
    """A JSON object of UUIDs, as in "Lost in the Middle" (Liu et al. 2023, arXiv 2307.03172, section 3)."""

    def draft(self, rng: Random, length: int, count: Count, haystack: str) -> tuple[Draft, Question]:
        key, value = draw("uuids", rng), draw("uuids", rng)
        question = Question(
            input=f'}}\n\nKey: "{key}"\n', gen_prefix="Corresponding value:", outputs=[value], answer=f' "{value}"'
        )
        head = (
            'Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{"note": "'
        )

        def another() -> str:
            return f'"{draw("uuids", rng)}": "{draw("uuids", rng)}"'

        def tokens(pairs: Sequence[str]) -> int:
            return count(head + _FILLER + _json(pairs) + question.text)

        pairs = _enough([f'"{key}": "{value}"'], another, tokens, length)
        rng.shuffle(pairs)
        return Draft(head, _FILLER, _json(pairs) + question.text), question


@dataclass(frozen=True)
class Recite(Task):
    """Needles in a text; asked for are all of them in order: hundreds of tokens, each a retrieval of its own.

    Attributes:
        num_keys: needles that are hidden; fewer in short prompts.
        spacing: tokens of the prompt for each needle, at least.

    The score is forced: after one number left out, a free run is late by one for the rest of the list.
    """

    forced: ClassVar[bool] = True
    num_keys: int = 64
    spacing: int = 120

    def draft(self, rng: Random, length: int, count: Count, haystack: str) -> tuple[Draft, Question]:
        keys = distinct(lambda: draw("words", rng), max(2, min(self.num_keys, length // self.spacing)))
        pairs = [(key, draw("numbers", rng)) for key in keys]
        needles = [NEEDLE.format(kind="numbers", key=key, value=value) for key, value in pairs]
        question = Question(
            input="\nList every special magic number in the order of the provided text:",
            gen_prefix="",
            outputs=[f"{key}: {value}" for key, value in pairs],
            answer="".join(f"\n{key}: {value}" for key, value in pairs),
        )
        head = OPENING.format(kind="numbers")
        room = length - count(head + "".join(needles) + question.text)
        passage = filling("text", haystack, room, needles, count, rng)
        return hide(needles, sorted(rng.random() for _ in needles), passage, head, question.text), question


_TASKS = (
    NeedleTask("niah_single_1", "a number in noise", 128, haystack="noise"),
    NeedleTask("niah_single_2", "a number in a text", 128),
    NeedleTask("niah_single_3", "a UUID in a text", 128, values="uuids"),
    NeedleTask("niah_single_words", "a pair of words in a text", 128, values="words"),
    NeedleTask("niah_multikey_1", "one of four numbers in a text", 128, num_keys=4),
    NeedleTask("niah_multikey_2", "one number among needles", 128, haystack="needles"),
    NeedleTask(
        "niah_multikey_3", "one UUID among needles with UUIDs", 128, haystack="needles", keys="uuids", values="uuids"
    ),
    NeedleTask("niah_multivalue", "four numbers of one key in a text", 128, num_values=4),
    NeedleTask("niah_multiquery", "four numbers of four keys in a text", 128, num_queries=4),
    VariableTracking("vt", "five variables of a chain in noise", 64),
    KeyValueRetrieval("kv_retrieval", "a value of a large JSON object", 128),
    Recite("recite", "every number in a text, in order", 64),
)
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}

_NIAH = [name for name in TASKS if name.startswith("niah") and name != "niah_single_words"]
SUITES: dict[str, list[str]] = {
    "needle": [name for name in _NIAH if name not in ("niah_multikey_3", "niah_multiquery")] + ["vt", "recite"],
    "niah": _NIAH,
    "ruler": [*_NIAH, "vt"],
    "all": list(TASKS),
}


def tasks_of(suite: str, names: Sequence[str] = ()) -> list[Task]:
    """The tasks of a suite, or those named, in the order of the table of tasks.

    Raises:
        TaskError: there is no such suite or task.
    """
    if suite not in SUITES:
        raise TaskError(f"--suite: expected one of {', '.join(SUITES)}, got {suite!r}")
    for name in names:
        if name not in TASKS:
            raise TaskError(f"--tasks: there is no task {name!r}{nearest(name, TASKS)}; tasks: {', '.join(TASKS)}")
    chosen = names or SUITES[suite]
    return [task for name, task in TASKS.items() if name in chosen]


def as_json(sample: Sample) -> dict[str, Any]:
    """A sample as plain data, with its prompt."""
    return {**asdict(sample), "prompt": sample.prompt}


def export_jsonl(samples: Iterable[Sample], path: str | Path) -> int:
    """Write samples, one JSON object a line, with their prompts; the number of lines. All of them, or no file."""
    lines = [json.dumps(as_json(sample), ensure_ascii=False) for sample in samples]
    write_file(Path(path), "".join(f"{line}\n" for line in lines))
    return len(lines)


def draw(kind: Kind, rng: Random) -> str:
    """A number of seven digits, two words with a hyphen, or a UUID."""
    if kind == "numbers":
        return str(rng.randrange(10**6, 10**7))
    if kind == "words":
        return f"{rng.choice(english_words())}-{rng.choice(english_words())}"
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def distinct(make: Callable[[], str], number: int) -> list[str]:
    """As many different ones of what is made."""
    taken: set[str] = set()
    return [other(taken, make) for _ in range(number)]


def other(taken: set[str], make: Callable[[], str]) -> str:
    """One that is not taken; it is then."""
    while (new := make()) in taken:
        pass
    taken.add(new)
    return new


def listed(words: Sequence[str]) -> str:
    """`a`, or `a, b, and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])}, and {words[-1]}"


def first_fit(make: Callable[[], tuple[Draft, Asked]], length: int, count: Count) -> tuple[str, Asked]:
    """The first draft that can be cut to the length, and what is asked about it."""
    reason = TaskError(f"no prompt of exactly {length} tokens was found for this tokenizer; try another length")
    for _ in range(20):
        draft, question = make()
        try:
            text = fit(draft, length, count)
        except TooShortError as error:  # another draft may have its pieces elsewhere
            reason = error
        else:
            if text is not None:
                return text, question
    raise reason


def filling(hay: Hay, text: str, room: int, pieces: Sequence[str], count: Count, rng: Random) -> str:
    """Noise or text that fills the room, with some tokens to spare: at every joint a token may be saved."""
    if room < 1:
        raise TaskError(f"the length is too short for what is hidden; at least {1 - room} more tokens are needed")
    tokens = room + 8 + 2 * len(pieces)
    if hay == "noise":
        text = NOISE * (tokens // 12 + 2)
    return excerpt(text, tokens, count, rng)


def _enough(
    items: list[str], another: Callable[[], str], tokens: Callable[[Sequence[str]], int], length: int
) -> list[str]:
    """The items and as many others as make the text at least `length` tokens long, without one too many."""
    cost = tokens([*items, another()]) - tokens(items)
    while (missing := length - tokens(items)) > 0:
        items += [another() for _ in range(max(1, int(0.8 * missing / cost)))]  # most of the way: costs differ
    return items


def _join(text: str, gen_prefix: str) -> str:
    """As lm-eval joins them: a space between, unless one of them has whitespace there."""
    if not gen_prefix or text[-1:].isspace() or gen_prefix[0].isspace():
        return text + gen_prefix
    return f"{text} {gen_prefix}"


def _json(pairs: Sequence[str]) -> str:
    """What follows the note of the JSON object, without its closing brace."""
    return '", ' + ", ".join(pairs)


def _assignments(chain: Sequence[str], value: int) -> Iterator[str]:
    yield f" VAR {chain[0]} = {value}."
    for before, after in pairwise(chain):
        yield f" VAR {after} = VAR {before}."
