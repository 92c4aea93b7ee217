"""The settings of a search, and the records that its journal keeps."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sparse_patch.calibration.moa.influence import BLOCK, Influence, Objective
from sparse_patch.calibration.moa.prompts import Answers

TASKS = ("recite", "niah_multikey_2", "kv_retrieval", "vt")
BASELINES = 4  # number of baselines that the chosen schedules are compared with


@dataclass(frozen=True)
class Settings:
    """The settings of a search for head schedules.

    Attributes:
        lengths: lengths at which the influence is measured, in tokens of prompt and answer together.
        density: largest mean share of the KV entries that schedules may keep, at each length and at `validate_length`.
        validate_length: tokens of the prompts that choose among schedules; None for 1.5 times the longest length.
        samples: number of prompts per length.
        validate_samples: number of prompts that choose among schedules.
        tasks: offline tasks of the prompts, in turn.
        text: file to take prompts from, instead of the tasks.
        answers: source of the tasks' answers: "task" or "model". Texts are always continued by the model.
        objective: the loss of an answer; see `Objective`.
        influence: "moa" or "set"; see `Influence`.
        max_rules: most different rules in a layer; None if unlimited.
        plans: most schedules to validate; those nearest to the best at all lengths are taken.
        seed: determines everything random.
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
        """The length of the prompts that choose among schedules."""
        return self.validate_length or max(self.lengths) * 3 // 2 // BLOCK * BLOCK

    @property
    def steps(self) -> int:
        """Largest number of steps of a search."""
        return len(self.lengths) * self.samples + (1 + self.plans + BASELINES) * self.validate_samples

    @property
    def measured(self) -> dict[str, Any]:
        """The settings that the journal's records depend on, as JSON values."""
        later = ("density", "influence", "max_rules", "plans")
        return {key: value for key, value in json.loads(json.dumps(asdict(self))).items() if key not in later}


@dataclass(frozen=True)
class Answered:
    """The answer that the model generates after a prompt."""

    length: int
    sample: int
    answer: list[int]

    @property
    def key(self) -> tuple[Any, ...]:
        return "answer", self.length, self.sample


@dataclass(frozen=True)
class Profiled:
    """The measurements of a prompt.

    Attributes:
        length: length that the prompt stands for.
        sample: index of the prompt.
        task: name of the prompt's task.
        loss: loss of the answer, by the objective.
        layers: indices of the layers with full attention.
        sink: `[layers][KV heads]`, see `Influence`.
        moa: `[layers][KV heads][blocks]`, see `Influence`.
        set: `[layers][KV heads][blocks]`, see `Influence`.
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
    """The cross-entropy of an answer under schedules or with dense attention; `plan` is a digest of the schedules."""

    plan: str
    length: int
    sample: int
    loss: float

    @property
    def key(self) -> tuple[Any, ...]:
        return "score", self.plan, self.length, self.sample


RECORD = Profiled | Scored | Answered  # types of the journal's records


def profiled(length: int, number: int, task: str, found: dict[int, Influence], loss: float) -> Profiled:
    """Make the record of a prompt. Curves have an entry for each block of the length, even if the prompt is shorter."""
    layers, blocks = sorted(found), -(-length // BLOCK)

    def curves(name: str) -> list[list[list[float]]]:
        rows = [getattr(found[layer], name).tolist() for layer in layers]
        return [[_short((row + [0.0] * blocks)[:blocks]) for row in layer] for layer in rows]

    sink = [_short(found[layer].sink.tolist()) for layer in layers]
    return Profiled(length, number, task, loss, layers, sink, curves("moa"), curves("set"))


def _short(row: list[float]) -> list[float]:
    return [float(f"{x:.5g}") for x in row]
