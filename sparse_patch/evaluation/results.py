"""The measurements: one record per prompt, one row per task, length and configuration; as tables and JSON."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich import box
from rich.table import Table

from sparse_patch.config import PatchConfig
from sparse_patch.evaluation.damage import Damage
from sparse_patch.evaluation.scoring import interval, mean_interval
from sparse_patch.workbench.adding import check_same_run

Interval = tuple[float, float]
Pairs = tuple[float, int, int]
Key = tuple[str, str, str, int, int]  # configuration, its fingerprint, task, length, number of the sample


@dataclass(frozen=True)
class Record:
    """The measurements of one prompt under one configuration: everything that a row needs.

    Attributes:
        found: (expected strings that the generated text contains, expected strings); None if the answer is compared
            with that of dense attention.
        right: (expected tokens that the model predicted, expected tokens).
        prefill, decode: (pairs computed, pairs of the causal triangle, queries) of each phase.
        text: what the model generated, or what it predicted if the task is forced or compared.
        damage: the comparison with dense attention; None if the answer is scored.
    """

    config: str
    fingerprint: str
    task: str
    length: int
    index: int
    right: tuple[int, int]
    prefill: Pairs
    decode: Pairs
    prefill_s: float
    decode_s: float
    fallbacks: dict[str, int]
    text: str
    found: tuple[int, int] | None = None
    damage: Damage | None = None

    @property
    def key(self) -> Key:
        return self.config, self.fingerprint, self.task, self.length, self.index


@dataclass(frozen=True)
class Row:
    """One configuration on one task at one length.

    Tasks have a score and exact match, or figures of damage; the others are None.

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
        kl: KL(dense || configuration) of the predictions, nats a token, mean over prompts.
        agreement: share of the tokens whose most probable prediction is that of dense attention.
        loss: cross-entropy of the true tokens, nats a token, mean over prompts; `exp` of it is the perplexity.
        added_loss: the loss above that of dense attention, mean over prompts.
        score_ci, exact_match_ci, token_accuracy_ci, kl_ci, agreement_ci, loss_ci, added_loss_ci: 95 % intervals; those
            of means are None for a single prompt.
    """

    config: str
    task: str
    length: int
    samples: int
    score: float | None
    exact_match: float | None
    token_accuracy: float
    density: float
    attended: float | None
    prefill_s: float
    decode_s: float
    fallbacks: dict[str, int]
    score_ci: Interval | None
    exact_match_ci: Interval | None
    token_accuracy_ci: Interval
    kl: float | None = None
    agreement: float | None = None
    loss: float | None = None
    added_loss: float | None = None
    kl_ci: Interval | None = None
    agreement_ci: Interval | None = None
    loss_ci: Interval | None = None
    added_loss_ci: Interval | None = None


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


def tables(rows: Sequence[Row], length: int) -> list[Table]:
    """The tables of one length: the scores of answers, and the damage of tasks that compare with dense attention."""
    chosen = [row for row in rows if row.length == length]
    scored = [row for row in chosen if row.score is not None]
    compared = [row for row in chosen if row.kl is not None]
    return [
        _table(part, columns, f"{length} tokens")
        for part, columns in ((scored, _SCORES | _COSTS), (compared, _DAMAGE | _COSTS))
        if part
    ]


def summaries(rows: Sequence[Row]) -> list[Table]:
    """Tables of means over tasks, with one line per length and configuration: of scores, and of damage."""
    scored = [row for row in rows if row.score is not None]
    compared = [row for row in rows if row.kl is not None]
    scores = {"score": ("score", ".3f"), "exact": ("exact_match", ".3f")}
    damage = {"KL": ("kl", ".2g"), "same": ("agreement", ".3f"), "added": ("added_loss", ".3f")}
    return [
        _summary(part, title, means)
        for part, title, means in (
            (scored, "mean over tasks", scores),
            (compared, "mean over tasks, compared with dense", damage),
        )
        if part
    ]


Columns = dict[str, Callable[[Row], str]]  # title -> cell of a row

_SCORES: Columns = {
    "score": lambda row: _number(row.score, 2),
    "95 %": lambda row: "" if row.score_ci is None else f"{row.score_ci[0]:.2f}-{row.score_ci[1]:.2f}",
    "exact": lambda row: _number(row.exact_match, 2),
    "tokens": lambda row: _number(row.token_accuracy, 3),
}
_DAMAGE: Columns = {
    "KL": lambda row: "" if row.kl is None else f"{row.kl:.2g}",
    "95 %": lambda row: "" if row.kl_ci is None else f"{row.kl_ci[0]:.2g}-{row.kl_ci[1]:.2g}",
    "same": lambda row: _number(row.agreement, 3),
    "loss": lambda row: _number(row.loss, 3),
    "added": lambda row: _number(row.added_loss, 3),
}
_COSTS: Columns = {
    "density": lambda row: _number(row.density, 2),
    "attended": lambda row: _number(row.attended, 0),
    "prefill s": lambda row: _number(row.prefill_s, 2),
    "decode s": lambda row: _number(row.decode_s, 2),
}


def _table(rows: Sequence[Row], columns: Columns, title: str) -> Table:
    """A table of tasks and configurations."""
    result = Table(title=title, title_justify="left", box=box.SIMPLE)
    result.add_column("task", no_wrap=True)
    result.add_column("config", no_wrap=True)
    for column in columns:
        result.add_column(column, justify="right")
    for number, row in enumerate(rows):
        result.add_row(
            row.task if number == 0 or rows[number - 1].task != row.task else "",
            row.config,
            *(cell(row) for cell in columns.values()),
            end_section=number + 1 < len(rows) and rows[number + 1].task != row.task,
        )
    return result


def _summary(rows: Sequence[Row], title: str, means: dict[str, tuple[str, str]]) -> Table:
    """A table of means over tasks. `means`: column -> a figure of the rows, and its format."""
    result = Table(title=title, title_justify="left", box=box.SIMPLE)
    means = {**means, "tokens": ("token_accuracy", ".3f"), "density": ("density", ".3f")}
    means |= {"prefill s": ("prefill_s", ".2f"), "decode s": ("decode_s", ".2f")}
    for column in ("length", "config", *means, "fallbacks"):
        result.add_column(column, justify="left" if column == "config" else "right", no_wrap=True)
    for length, config in dict.fromkeys((row.length, row.config) for row in rows):
        chosen = [row for row in rows if (row.length, row.config) == (length, config)]
        result.add_row(
            str(length),
            config,
            *(f"{fmean(getattr(row, name) for row in chosen):{form}}" for name, form in means.values()),
            str(sum(sum(row.fallbacks.values()) for row in chosen)),
        )
    return result


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _row(records: Sequence[Record]) -> Row:
    first = records[0]
    computed, causal, _ = (sum(values) for values in zip(*(record.prefill for record in records), strict=True))
    read, _, queries = (sum(values) for values in zip(*(record.decode for record in records), strict=True))
    fallbacks: Counter[str] = Counter()
    for record in records:
        fallbacks.update(record.fallbacks)
    return Row(
        config=first.config,
        task=first.task,
        length=first.length,
        samples=len(records),
        token_accuracy=sum(record.right[0] for record in records) / sum(record.right[1] for record in records),
        density=computed / causal,
        attended=read / queries if queries else None,
        prefill_s=median(record.prefill_s for record in records),
        decode_s=median(record.decode_s for record in records),
        fallbacks=dict(fallbacks),
        token_accuracy_ci=_interval(record.right for record in records),
        **_scores(records),
        **_damage(records),
    )


def _scores(records: Sequence[Record]) -> dict[str, Any]:
    """The figures of answers that are scored."""
    found = [record.found for record in records if record.found is not None]
    if not found:
        return dict.fromkeys(("score", "exact_match", "score_ci", "exact_match_ci"))
    exact = [int(record.right[0] == record.right[1]) for record in records]
    return {
        "score": fmean(there / expected for there, expected in found),
        "exact_match": fmean(exact),
        "score_ci": _interval(found),
        "exact_match_ci": interval(exact, [1] * len(exact)),
    }


def _damage(records: Sequence[Record]) -> dict[str, Any]:
    """The figures of answers that are compared with those of dense attention."""
    found = [(record.damage, record.right[1]) for record in records if record.damage is not None]
    if not found:
        return {}
    least = {"kl": 0.0, "loss": 0.0}  # neither can be negative
    same = [(damage.same, tokens) for damage, tokens in found]
    means = {
        "kl": [damage.kl for damage, _ in found],
        "loss": [damage.loss for damage, _ in found],
        "added_loss": [damage.loss - damage.dense_loss for damage, _ in found],
    }
    return {
        **{name: fmean(values) for name, values in means.items()},
        **{f"{name}_ci": mean_interval(values, least.get(name)) for name, values in means.items()},
        "agreement": sum(there for there, _ in same) / sum(tokens for _, tokens in same),
        "agreement_ci": _interval(same),
    }


def _interval(shares: Iterable[tuple[int, int]]) -> Interval:
    successes, trials = zip(*shares, strict=True)
    return interval(successes, trials)
