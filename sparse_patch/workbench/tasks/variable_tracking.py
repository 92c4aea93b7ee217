"""RULER's variable tracking."""

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from sparse_patch.workbench.prompts import Count, Draft, hide
from sparse_patch.workbench.tasks.base import Question, Task
from sparse_patch.workbench.tasks.drafts import distinct, filling


@dataclass(frozen=True)
class VariableTracking(Task):
    """A chain of assignments is hidden in noise; every variable with the value is asked for.

    Attributes:
        chains: number of hidden chains; the first one is asked for.
        hops: number of assignments from variable to variable in each chain.
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


def _assignments(chain: Sequence[str], value: int) -> Iterator[str]:
    yield f" VAR {chain[0]} = {value}."
    for before, after in pairwise(chain):
        yield f" VAR {after} = VAR {before}."
