"""The settings of a search, and what it measures, as its journal keeps it."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sparse_patch.calibration.moa.influence import BLOCK, Influence, Objective
from sparse_patch.calibration.moa.prompts import Answers

TASKS = ("recite", "niah_multikey_2", "kv_retrieval", "vt")
BASELINES = 4  # that the chosen schedules are compared with


@dataclass(frozen=True)
class Settings:
    """What is searched for, and with what.

    Attributes:
        lengths: tokens of prompt and answer together, at each of which the influence is measured.
        density: largest mean share of the KV entries that schedules keep, at each length and at `validate_length`.
        validate_length: tokens of the prompts that choose among schedules; None for half as many again as the longest.
        samples: prompts of each length.
        validate_samples: prompts that choose among schedules.
        tasks: offline tasks that the prompts are of, in turn.
        text: file to take prompts from in place of tasks.
        answers: who answers the tasks; texts are always gone on with by the model.
        objective: what an answer loses; see `Objective`.
        influence: "moa" or "set"; see `Influence`.
        max_rules: different rules in a layer; None for any number.
        plans: most schedules that are validated: those nearest to the best at all lengths.
        seed: chooses everything that is random.
    """

    lengths: tuple[int, ...] = (2048, 4096, 8192)
    density: float = 0.5
    validate_length: int | None = None
    samples: int = 4
    validate_samples: int = 3
    tasks: tuple[str, ...] = TASKS
    text: str | None = None
    answers: Answers = "task"
    objective: Objective = "log-odds"
    influence: Literal["moa", "set"] = "set"
    max_rules: int | None = None
    plans: int = 4
    seed: int = 0

    @property
    def unseen(self) -> int:
        """The length that chooses among schedules."""
        return self.validate_length or max(self.lengths) * 3 // 2 // BLOCK * BLOCK

    @property
    def steps(self) -> int:
        """Most steps of a search."""
        return len(self.lengths) * self.samples + (1 + self.plans + BASELINES) * self.validate_samples

    @property
    def measured(self) -> dict[str, Any]:
        """The settings that what is in a journal depends on, as JSON has them."""
        later = ("density", "influence", "max_rules", "plans")
        return {key: value for key, value in json.loads(json.dumps(asdict(self))).items() if key not in later}


@dataclass(frozen=True)
class Answered:
    """What the model says after a prompt."""

    length: int
    sample: int
    answer: list[int]

    @property
    def key(self) -> tuple[Any, ...]:
        return "answer", self.length, self.sample


@dataclass(frozen=True)
class Profiled:
    """What a prompt shows.

    Attributes:
        length: that it stands for.
        sample: its number.
        task: what it is of.
        loss: of its answer, by the objective.
        layers: with full attention.
        sink: `[layers][KV heads]`, see `Influence`.
        moa: `[layers][KV heads][blocks]`.
        set: likewise.
    """

    length: int
    sample: int
    task: str
    loss: float
    layers: list[int]
    sink: list[list[float]]
    moa: list[list[list[float]]]
    set: list[list[list[float]]]

    @property
    def key(self) -> tuple[Any, ...]:
        return "profile", self.length, self.sample


@dataclass(frozen=True)
class Scored:
    """The cross-entropy of an answer under schedules, or densely; `plan` are digits that tell these apart."""

    plan: str
    length: int
    sample: int
    loss: float

    @property
    def key(self) -> tuple[Any, ...]:
        return "score", self.plan, self.length, self.sample


RECORD = Profiled | Scored | Answered  # of a journal


def profiled(length: int, number: int, task: str, found: dict[int, Influence], loss: float) -> Profiled:
    """The record of a prompt: curves have an entry for each block of the length, the prompt may have fewer tokens."""
    layers, blocks = sorted(found), -(-length // BLOCK)

    def curves(name: str) -> list[list[list[float]]]:
        rows = [getattr(found[layer], name).tolist() for layer in layers]
        return [[_short((row + [0.0] * blocks)[:blocks]) for row in layer] for layer in rows]

    sink = [_short(found[layer].sink.tolist()) for layer in layers]
    return Profiled(length, number, task, loss, layers, sink, curves("moa"), curves("set"))


def _short(row: list[float]) -> list[float]:
    return [float(f"{x:.5g}") for x in row]
