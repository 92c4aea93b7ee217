# SPDX-License-Identifier: Apache-2.0
"""Training sequences for needle-llama: RULER-format retrieval tasks hidden in real text, and plain text.

Input: the folder that prep.py writes (tokenizer.json, words.json, docs.npy, doc_off.npy).

Output: `TaskGenerator(seed, folder).sample(length, mix)` gives one sequence of exactly `length` tokens with a weight
for each token: 0 for the first token and for padding, 1 for prompt and haystack, 2 for the tokens of an answer.

As a script it prints how fast each task is generated and two examples:

    python gen.py --data data

The order of the random draws is part of the record: the same seed and data give the same sequences. `vt` also iterates
over a set of strings, so it repeats between processes only with a fixed PYTHONHASHSEED.
"""

import argparse
import json
import random
import string
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

BEGIN_ID = 0
PAD_ID = 2
UNSCORED, TEXT, ANSWER = 0, 1, 2  # the weights

NOISE = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
RECALL_INTRO = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
NEEDLE = " One of the special magic {kind} for {key} is: {value}."
ASK_ONE = (
    "\nWhat is the special magic {kind} for {key} mentioned in the provided text? "
    "The special magic {kind} for {key} mentioned in the provided text is"
)
ASK_ALL = (
    "\nWhat are all the special magic {kind} for {key} mentioned in the provided text? "
    "The special magic {kind} for {key} mentioned in the provided text are"
)
CHAIN_INTRO = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
ASK_CHAIN = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above. "
    "Answer: According to the chain(s) of variable assignment in the text above, "
    "{count} variables are assigned the value {value}, they are: "
)
COMMON_INTRO = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
ASK_COMMON = (
    "\nQuestion: What are the 10 most common words in the above list? "
    "Answer: The top 10 words that appear most often in the list are:"
)
ASK_RECITE = "\nList every special magic number in the order of the provided text:"

KEY_COST = {"words": 24, "uuids": 45}  # approximate tokens of a needle without its value
VALUE_COST = {"numbers": 10, "uuids": 40, "words": 8}
SLACK = 8  # tokens of haystack that must be left between the inserted pieces
CACHE_ENTRIES = 2000


class Sequence(NamedTuple):
    """Token ids (uint16) and their weights (uint8)."""

    tokens: np.ndarray
    weights: np.ndarray


class Segment(NamedTuple):
    """A part of the prompt after the haystack: a question, or its answer."""

    text: str
    is_answer: bool


# Takes the number of tokens left; gives the middle of a sequence, or None if it does not fit.
Context = Callable[[int], np.ndarray | None]


def listing(items: list[str]) -> str:
    """Write a list as RULER does: `a`, or `a, and b`, or `a, b, and c`."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + ", and " + items[-1]


def exchange(question: str, answer: str) -> list[Segment]:
    return [Segment(question, False), Segment(answer, True)]


def take_while_fits(pieces: Iterator[np.ndarray], room: int) -> np.ndarray | None:
    """Take as many whole pieces from the front as fit into `room` tokens."""
    taken: list[np.ndarray] = []
    used = 0
    for piece in pieces:
        if used + len(piece) > room:
            break
        taken.append(piece)
        used += len(piece)
    return np.concatenate(taken) if taken else None


class TaskGenerator:
    """Draws training sequences. The methods that `sample` may call have the names of RULER or of the model card."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.rng = random.Random(seed)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.words: list[str] = json.loads((folder / "words.json").read_text(encoding="utf-8"))
        self.docs = np.load(folder / "docs.npy", mmap_mode="r")
        self.offsets = np.load(folder / "doc_off.npy")
        self.lengths = np.diff(self.offsets)
        self.cache: dict[str, np.ndarray] = {}
        self.ends_sentence = self._sentence_ends()
        self.noise = self.encode(NOISE)
        self.tasks: dict[str, Callable[[int], Sequence | None]] = {
            "niah": self.niah,
            "vt": self.vt,
            "cwe": self.cwe,
            "recite": self.recite,
            "text": self.text,
            "copy": self.copy,
        }

    def _sentence_ends(self) -> np.ndarray:
        """For each token id, whether a needle may follow it: the token ends in a full stop or contains a newline."""
        token_of = {index: token for token, index in self.tokenizer.get_vocab().items()}
        newline = "\u010a"  # byte-level BPE's spelling of a newline
        tokens = [token_of[index] for index in range(len(token_of))]
        return np.array([token.endswith(".") or newline in token for token in tokens])

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text. Long texts are cached, because most of them are the fixed prompts."""
        if text in self.cache:
            return self.cache[text]
        ids = np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint16)
        if len(text) > 60 and len(self.cache) < CACHE_ENTRIES:
            self.cache[text] = ids
        return ids

    # Building blocks

    def haystack(self, length: int, kind: str = "essay") -> np.ndarray:
        """`length` tokens of RULER's noise sentences or of documents, each starting at a random place."""
        if kind == "noise":
            return np.tile(self.noise, length // len(self.noise) + 1)[:length]
        parts: list[np.ndarray] = []
        filled = 0
        while filled < length:
            index = self.rng.randrange(len(self.lengths))
            size = self.lengths[index]
            skipped = self.rng.randrange(max(1, size - 500)) if size > 500 else 0
            begin = self.offsets[index] + skipped
            part = self.docs[begin : min(self.offsets[index + 1], begin + length - filled)]
            parts.append(np.asarray(part))
            filled += len(part)
        return np.concatenate(parts)

    def word_pair(self) -> str:
        return self.rng.choice(self.words) + "-" + self.rng.choice(self.words)

    def uuid4(self) -> str:
        return str(uuid.UUID(int=self.rng.getrandbits(128), version=4))

    def value(self, kind: str) -> str:
        if kind == "numbers":
            return str(self.rng.randrange(10**6, 10**7))
        return self.uuid4() if kind == "uuids" else self.word_pair()

    def insert(self, haystack: np.ndarray, pieces: list[np.ndarray]) -> np.ndarray:
        """Put the pieces, in order, after random sentence ends, or anywhere if there are too few sentence ends."""
        places = np.flatnonzero(self.ends_sentence[haystack]) + 1
        if len(places) < len(pieces):
            places = np.arange(1, len(haystack))
        chosen = sorted(self.rng.choices(places.tolist(), k=len(pieces)))
        parts: list[np.ndarray] = []
        previous = 0
        for place, piece in zip(chosen, pieces, strict=True):
            parts += [haystack[previous:place], piece]
            previous = place
        return np.concatenate([*parts, haystack[previous:]])

    def hide(self, pieces: list[np.ndarray], room: int, kind: str) -> np.ndarray | None:
        """A haystack of `room` tokens with the pieces in it, or None if they leave no room for one."""
        total = sum(map(len, pieces))
        if total > room - SLACK:
            return None
        return self.insert(self.haystack(room - total, kind), pieces)

    def assemble(self, length: int, intro: str, context: Context, tail: list[Segment]) -> Sequence | None:
        """Join begin token, intro, context and tail; the context takes the remaining room."""
        encoded = [self.encode(segment.text) for segment in tail]
        tail_ids = np.concatenate(encoded)
        tail_weights = np.concatenate(
            [
                np.full(len(ids), ANSWER if segment.is_answer else TEXT, np.uint8)
                for ids, segment in zip(encoded, tail, strict=True)
            ]
        )
        intro_ids = self.encode(intro)
        room = length - len(tail_ids) - len(intro_ids) - 1
        if room < 32:
            return None
        middle = context(room)
        if middle is None:
            return None
        middle = middle[:room]
        tokens = np.concatenate([[BEGIN_ID], intro_ids, middle, tail_ids]).astype(np.uint16)
        body_weights = np.full(len(intro_ids) + len(middle), TEXT, np.uint8)
        weights = np.concatenate([np.full(1, UNSCORED, np.uint8), body_weights, tail_weights])
        return Sequence(tokens, weights)

    # Tasks

    def niah(
        self,
        length: int,
        n_queries: int | None = None,
        haystack: str | None = None,
        key_type: str | None = None,
        value_type: str | None = None,
        n_keys: int | None = None,
        n_values: int | None = None,
    ) -> Sequence | None:
        """Needles in a haystack: look up the values of some keys. Arguments that are None are drawn."""
        rng = self.rng
        haystack = haystack or rng.choice(["essay", "essay", "essay", "noise", "needle"])
        key_type = key_type or rng.choice(["words", "words", "words", "uuids"])
        value_type = value_type or rng.choice(["numbers", "numbers", "words", "uuids"])
        n_values = n_values or rng.choice([1, 1, 1, 2, 4])
        key_tokens = (KEY_COST[key_type] + VALUE_COST[value_type]) * n_values
        n_keys = n_keys or max(1, min(rng.choice([1, 2, 4, 8, 16, 32]), length // (key_tokens * 3)))
        if haystack == "needle":
            n_keys = max(n_keys, int(length * 0.97) // key_tokens)
        keys = [self.word_pair() if key_type == "words" else self.uuid4() for _ in range(n_keys)]
        values_of = {key: [self.value(value_type) for _ in range(n_values)] for key in keys}
        needles = [(key, value) for key, values in values_of.items() for value in values]
        rng.shuffle(needles)
        n_queries = n_queries or max(1, min(n_keys, rng.choice([1, 2, 4, 8, 16]), length // (key_tokens * 6)))
        one_by_one = rng.random() < 0.5
        candidates = self._surely_fitting(needles, n_values) if haystack == "needle" else list(values_of)
        if not candidates:
            return None
        queries = rng.sample(candidates, min(n_queries, len(candidates)))
        answers = {key: [value for other, value in needles if other == key] for key in queries}  # in text order
        # The last draw happens only if the rest allows a joint question.
        jointly = not one_by_one and len(queries) >= 2 and n_values == 1 and rng.random() < 0.5
        tail = self._joint_question(answers, value_type) if jointly else self._questions(answers, value_type)

        def context(room: int) -> np.ndarray | None:
            pieces = (self.encode(NEEDLE.format(kind=value_type, key=key, value=value)) for key, value in needles)
            return take_while_fits(pieces, room) if haystack == "needle" else self.hide(list(pieces), room, haystack)

        return self.assemble(length, RECALL_INTRO.format(kind=value_type), context, tail)

    @staticmethod
    def _surely_fitting(needles: list[tuple[str, str]], n_values: int) -> list[str]:
        """Keys with all values in the first 80% of a haystack made of needles, whose end is cut off."""
        seen = Counter(key for key, _ in needles[: int(len(needles) * 0.8)])
        return [key for key, count in seen.items() if count == n_values]

    @staticmethod
    def _joint_question(answers: dict[str, list[str]], value_type: str) -> list[Segment]:
        """One question about the first four keys, each of which has one value."""
        keys = list(answers)[:4]
        answer = listing([answers[key][0] for key in keys])
        return exchange(ASK_ALL.format(kind=value_type, key=listing(keys)), f" {answer}.")

    @staticmethod
    def _questions(answers: dict[str, list[str]], value_type: str) -> list[Segment]:
        """One question after another."""
        tail: list[Segment] = []
        for key, values in answers.items():
            if len(values) == 1 and value_type != "words":
                question = ASK_ONE.format(kind=value_type.removesuffix("s"), key=key)
            else:
                question = ASK_ALL.format(kind=value_type, key=key)
            tail += exchange(question, f" {listing(values)}.")
        return tail

    def vt(
        self, length: int, n_chains: int | None = None, hops: int | None = None, haystack: str | None = None
    ) -> Sequence | None:
        """Variable tracking: name every variable that a value reaches through assignments."""
        rng = self.rng
        n_chains = n_chains or rng.choice([1, 1, 2, 4])
        hops = hops or rng.choice([1, 2, 3, 4, 4])
        chains = self._chains(n_chains, hops + 1)
        values = [str(rng.randrange(10000, 100000)) for _ in chains]
        haystack = haystack or rng.choice(["noise", "essay"])

        def context(room: int) -> np.ndarray | None:
            return self.hide(self._interleaved_assignments(chains, values), room, haystack)

        tail: list[Segment] = []
        n_asked = rng.choice([1, 2, 4])
        for chain, value in list(zip(chains, values, strict=True))[:n_asked]:
            tail += exchange(ASK_CHAIN.format(value=value, count=hops + 1), " ".join(chain) + ".")
        return self.assemble(length, CHAIN_INTRO, context, tail)

    def _chains(self, n_chains: int, size: int) -> list[list[str]]:
        """Chains of variable names, all different."""
        distinct: set[str] = set()
        while len(distinct) < n_chains * size:
            distinct.add("".join(self.rng.choices(string.ascii_uppercase, k=5)))
        names = list(distinct)
        self.rng.shuffle(names)
        return [names[index * size : (index + 1) * size] for index in range(n_chains)]

    def _interleaved_assignments(self, chains: list[list[str]], values: list[str]) -> list[np.ndarray]:
        """The assignments of all chains in random turns, each chain in its own order."""
        streams = [
            [self.encode(f" VAR {chain[0]} = {value}.")]
            + [self.encode(f" VAR {target} = VAR {origin}.") for origin, target in pairwise(chain)]
            for chain, value in zip(chains, values, strict=True)
        ]
        turns = [index for index, stream in enumerate(streams) for _ in stream]
        self.rng.shuffle(turns)
        iterators = [iter(stream) for stream in streams]
        return [next(iterators[index]) for index in turns]

    def cwe(self, length: int) -> Sequence | None:
        """Common-word extraction: the ten words that a numbered list repeats most."""
        n_common = 10
        common_repeats = max(3, min(30, length // 60))
        other_repeats = max(1, common_repeats // 10)
        n_others = max(5, (length // 5 - n_common * common_repeats) // other_repeats)
        words = self.rng.sample(self.words, min(len(self.words), n_common + n_others))
        common = words[:n_common]
        entries = common * common_repeats + words[n_common:] * other_repeats
        self.rng.shuffle(entries)

        def context(room: int) -> np.ndarray | None:
            numbered = (f"{' ' if index else ''}{index + 1}. {word}" for index, word in enumerate(entries))
            return take_while_fits(map(self.encode, numbered), room)

        answer = " ".join(f"{index + 1}. {word}" for index, word in enumerate(sorted(common)))
        return self.assemble(length, COMMON_INTRO, context, exchange(ASK_COMMON, f" {answer}."))

    def recite(self, length: int) -> Sequence | None:
        """A long answer: repeat every hidden record in order, which is hard on decoding."""
        n_records = max(2, min(64, length // 120))
        records = [(self.word_pair(), self.value("numbers")) for _ in range(n_records)]

        def context(room: int) -> np.ndarray | None:
            pieces = [self.encode(NEEDLE.format(kind="numbers", key=key, value=value)) for key, value in records]
            return self.hide(pieces, room, "essay")

        answer = "".join(f"\n{key}: {value}" for key, value in records) + "."
        return self.assemble(length, RECALL_INTRO.format(kind="numbers"), context, exchange(ASK_RECITE, answer))

    def text(self, length: int) -> Sequence:
        """Plain text."""
        tokens = np.concatenate([[BEGIN_ID], self.haystack(length - 1)]).astype(np.uint16)
        return Sequence(tokens, np.full(length, TEXT, np.uint8))

    def copy(self, length: int) -> Sequence:
        """Spans of text mixed with repeats of earlier spans, for induction heads."""
        span_length = self.rng.choice([32, 64, 128])
        source = self.haystack(length // 2)
        spans = [np.full(1, BEGIN_ID, np.uint16)]
        weights = [np.full(1, TEXT, np.uint8)]
        filled = 1
        while filled < length:
            # The draw comes first, although it is not needed at the start, where there is little to repeat.
            fresh = self.rng.random() < 0.5 or filled < span_length * 2
            pool = source if fresh else np.concatenate(spans)
            begin = self.rng.randrange(max(1, len(pool) - span_length))
            span = pool[begin : begin + span_length]
            span_weights = np.full(len(span), TEXT if fresh else ANSWER, np.uint8)
            span_weights[:2] = TEXT  # nobody can tell what is repeated before it has begun
            spans.append(span)
            weights.append(span_weights)
            filled += len(span)
        return Sequence(np.concatenate(spans)[:length].astype(np.uint16), np.concatenate(weights)[:length])

    def sample(self, length: int, mix: Mapping[str, float]) -> Sequence:
        """Draw a task by the mix's weights and give one sequence, padded to `length`; redraw if it does not fit."""
        while True:
            task = self.rng.choices(list(mix), list(mix.values()))[0]
            sequence = self.tasks[task](length)
            if sequence is None or len(sequence.tokens) > length:
                continue
            padding = length - len(sequence.tokens)
            tokens = np.concatenate([sequence.tokens, np.full(padding, PAD_ID, np.uint16)])
            return Sequence(tokens, np.concatenate([sequence.weights, np.full(padding, UNSCORED, np.uint8)]))


def report_speed(generator: TaskGenerator, length: int = 2048, rounds: int = 20) -> None:
    for name, task in generator.tasks.items():
        started = time.perf_counter()
        sequences = [task(length) for _ in range(rounds)]
        tokens = sum(len(sequence.tokens) for sequence in sequences if sequence is not None)
        print(f"{name} {tokens / (time.perf_counter() - started):.0f} tok/s")


def show_example(generator: TaskGenerator, name: str, length: int) -> None:
    """Print the end of one sequence, where the question and the answer are."""
    sequence = generator.sample(length, {name: 1})
    print(generator.tokenizer.decode(sequence.tokens.tolist())[-600:])


def main() -> None:
    parser = argparse.ArgumentParser(description="Show how fast needle-llama's tasks are generated, and two examples.")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder that prep.py wrote")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    generator = TaskGenerator(args.seed, args.data)
    report_speed(generator)
    show_example(generator, "niah", 600)
    show_example(generator, "vt", 400)


if __name__ == "__main__":
    main()
