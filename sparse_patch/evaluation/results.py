"""The measurements: one record per prompt, one row per task, length and configuration; as tables and JSON."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich import box
from rich.table import Table

from sparse_patch.config import PatchConfig
from sparse_patch.evaluation.scoring import interval
from sparse_patch.workbench.adding import check_same_run

Pairs = tuple[float, int, int]
Key = tuple[str, str, str, int, int]  # configuration, its fingerprint, task, length, number of the sample


@dataclass(frozen=True)
class Record:
    """The measurements of one prompt under one configuration: everything that a row needs.

    Attributes:
        found: (expected strings that the generated text contains, expected strings).
        right: (expected tokens that the model predicted, expected tokens).
        prefill, decode: (pairs computed, pairs of the causal triangle, queries) of each phase.
        text: what the model generated, or what it predicted if the task is forced.
    """

    config: str
    fingerprint: str
    task: str
    length: int
    index: int
    found: tuple[int, int]
    right: tuple[int, int]
    prefill: Pairs
    decode: Pairs
    prefill_s: float
    decode_s: float
    fallbacks: dict[str, int]
    text: str

    @property
    def key(self) -> Key:
        return self.config, self.fingerprint, self.task, self.length, self.index


@dataclass(frozen=True)
class Row:
    """One configuration on one task at one length.

    Attributes:
        config: the configuration's label; `dense` for dense attention.
        samples: number of prompts.
        score: RULER's score: share of the expected strings that the generated text contains (the predicted text, if the
            task is forced), mean over prompts.
        exact_match: share of the prompts for which every answer token was predicted.
        token_accuracy: share of the answer tokens that were predicted, each after the right tokens before it.
        density: share of the causal triangle that prefill computed.
        attended: keys read per decoded token and layer; None if answers have one token.
        prefill_s: median seconds to read a prompt.
        decode_s: median seconds to decode an answer of the expected length.
        fallbacks: reason -> number of attention calls that ran densely because the method could not serve them.
        score_ci, exact_match_ci, token_accuracy_ci: 95 % intervals.
    """

    config: str
    task: str
    length: int
    samples: int
    score: float
    exact_match: float
    token_accuracy: float
    density: float
    attended: float | None
    prefill_s: float
    decode_s: float
    fallbacks: dict[str, int]
    score_ci: tuple[float, float]
    exact_match_ci: tuple[float, float]
    token_accuracy_ci: tuple[float, float]


def rows(records: Iterable[Record]) -> list[Row]:
    """Make one row for each length, task and configuration, in the order in which the records come."""
    groups: dict[tuple[str, str, str, int], list[Record]] = {}
    for record in records:
        groups.setdefault(record.key[:-1], []).append(record)
    return [_row(group) for group in groups.values()]


def as_json(rows: Sequence[Row], header: Mapping[str, Any], configs: Mapping[str, PatchConfig]) -> dict[str, Any]:
    """The JSON of a run: its header, the configurations with every default, and the rows."""
    described = {
        label: {"fingerprint": config.fingerprint(), "source": config.source, **config.settings()}
        for label, config in configs.items()
    }
    return {**header, "configs": described, "rows": [asdict(row) for row in rows]}


def add_to(old: dict[str, Any], new: dict[str, Any], path: Path) -> dict[str, Any]:
    """Merge an earlier result with a new one. If both have a configuration, task and length, the new row is kept.

    Raises:
        TaskError: the two runs had different prompts or machines, or used one label for two configurations.
    """
    check_same_run(old, new, path, lambda config: config["fingerprint"])
    measured = {(row["config"], row["task"], row["length"]) for row in new["rows"]}
    kept = [row for row in old["rows"] if (row["config"], row["task"], row["length"]) not in measured]
    return {**new, "configs": {**old["configs"], **new["configs"]}, "rows": [*kept, *new["rows"]]}


def table(rows: Sequence[Row], length: int) -> Table:
    """A table of the tasks and configurations at one length."""
    result = Table(title=f"{length} tokens", title_justify="left", box=box.SIMPLE)
    result.add_column("task", no_wrap=True)
    result.add_column("config", no_wrap=True)
    for column in ("score", "95 %", "exact", "tokens", "density", "attended", "prefill s", "decode s"):
        result.add_column(column, justify="right")
    chosen = [row for row in rows if row.length == length]
    for number, row in enumerate(chosen):
        low, high = row.score_ci
        result.add_row(
            row.task if number == 0 or chosen[number - 1].task != row.task else "",
            row.config,
            f"{row.score:.2f}",
            f"{low:.2f}-{high:.2f}",
            f"{row.exact_match:.2f}",
            f"{row.token_accuracy:.3f}",
            f"{row.density:.2f}",
            "" if row.attended is None else f"{row.attended:.0f}",
            f"{row.prefill_s:.2f}",
            f"{row.decode_s:.2f}",
            end_section=number + 1 < len(chosen) and chosen[number + 1].task != row.task,
        )
    return result


def summary(rows: Sequence[Row]) -> Table:
    """A table of means over tasks, with one line per length and configuration."""
    result = Table(title="mean over tasks", title_justify="left", box=box.SIMPLE)
    for column in ("length", "config", "score", "exact", "tokens", "density", "prefill s", "decode s", "fallbacks"):
        result.add_column(column, justify="left" if column == "config" else "right", no_wrap=True)
    for length, config in dict.fromkeys((row.length, row.config) for row in rows):
        chosen = [row for row in rows if (row.length, row.config) == (length, config)]
        result.add_row(
            str(length),
            config,
            f"{fmean(row.score for row in chosen):.3f}",
            f"{fmean(row.exact_match for row in chosen):.3f}",
            f"{fmean(row.token_accuracy for row in chosen):.3f}",
            f"{fmean(row.density for row in chosen):.3f}",
            f"{fmean(row.prefill_s for row in chosen):.2f}",
            f"{fmean(row.decode_s for row in chosen):.2f}",
            str(sum(sum(row.fallbacks.values()) for row in chosen)),
        )
    return result


def _row(records: Sequence[Record]) -> Row:
    first = records[0]
    computed, causal, _ = (sum(values) for values in zip(*(record.prefill for record in records), strict=True))
    read, _, queries = (sum(values) for values in zip(*(record.decode for record in records), strict=True))
    exact = [int(record.right[0] == record.right[1]) for record in records]
    fallbacks: Counter[str] = Counter()
    for record in records:
        fallbacks.update(record.fallbacks)
    return Row(
        config=first.config,
        task=first.task,
        length=first.length,
        samples=len(records),
        score=fmean(record.found[0] / record.found[1] for record in records),
        exact_match=fmean(exact),
        token_accuracy=sum(record.right[0] for record in records) / sum(record.right[1] for record in records),
        density=computed / causal,
        attended=read / queries if queries else None,
        prefill_s=median(record.prefill_s for record in records),
        decode_s=median(record.decode_s for record in records),
        fallbacks=dict(fallbacks),
        score_ci=_interval(record.found for record in records),
        exact_match_ci=interval(exact, [1] * len(exact)),
        token_accuracy_ci=_interval(record.right for record in records),
    )


def _interval(shares: Iterable[tuple[int, int]]) -> tuple[float, float]:
    successes, trials = zip(*shares, strict=True)
    return interval(successes, trials)
