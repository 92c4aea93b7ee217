"""The demo on the shipped model: questions about a long document, answered with dense and with sparse attention."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from sparse_patch.config import PatchConfig, load_config
from sparse_patch.errors import TaskError
from sparse_patch.evaluation.document import NeedleDocument, needle_document
from sparse_patch.integration.patching import patched
from sparse_patch.integration.reporting import capture_plans, sparsity_report
from sparse_patch.models.loading import check_context, load_model
from sparse_patch.plots import Captured
from sparse_patch.report import SparsityReport
from sparse_patch.workbench.generation import Prefilled, forward, prefill
from sparse_patch.workbench.machine import machine
from sparse_patch.workbench.progress import Step

_ANSWER_TOKENS = 12
_WARM_UP_TOKENS = 6144  # long enough that the sparse path runs too


@dataclass
class Run:
    """The run of one configuration, dense or sparse: the answers, and the seconds of each prefill."""

    answers: list[str] = field(default_factory=list)
    prefill_s: list[float] = field(default_factory=list)


@dataclass
class DemoResult:
    """The demo's measurements; `summary()` gives them as JSON."""

    length: int
    seed: int
    config: PatchConfig
    document: NeedleDocument
    dense: Run
    sparse: Run
    prefill_report: SparsityReport  # of the long prefill only
    report: SparsityReport  # of the long prefill and the answers
    plans: Captured  # of the long prefill

    @property
    def speedup(self) -> float:
        return median(self.dense.prefill_s) / median(self.sparse.prefill_s)

    def exact_match(self, run: Run) -> float:
        right = [answer == q.outputs[0] for answer, q in zip(run.answers, self.document.questions, strict=True)]
        return sum(right) / len(right)

    def summary(self) -> dict[str, Any]:
        return {
            "length": self.length,
            "seed": self.seed,
            "config": self.config.settings(),
            "needles": len(self.document.questions),
            "repeats": len(self.dense.prefill_s),
            "dense": {"exact_match": self.exact_match(self.dense), "prefill_s": median(self.dense.prefill_s)},
            "sparse": {
                "exact_match": self.exact_match(self.sparse),
                "prefill_s": median(self.sparse.prefill_s),
                "density": self.prefill_report.density(),
                "attended": self.report.attended("decode"),
            },
            "speedup": self.speedup,
            "fallbacks": self.report.fallbacks(),
            "questions": [
                {"key": key, "depth": depth, "expected": q.outputs[0], "dense": dense, "sparse": sparse}
                for key, q, depth, dense, sparse in zip(
                    self.document.keys,
                    self.document.questions,
                    self.document.depths,
                    self.dense.answers,
                    self.sparse.answers,
                    strict=True,
                )
            ],
            "machine": {**machine(), **self.report.versions},
        }


def run_demo(
    model_path: str | Path, config: str, length: int, seed: int, needles: int = 8, repeats: int = 3, step: Step = print
) -> DemoResult:
    """Answer questions about a document of `length` tokens with dense and with sparse prefill, and time both.

    Each prefill is timed `repeats` times, dense and sparse in turn, after a warm-up of both. The first question ends
    the prompt. The others are asked as further turns on the same KV cache.

    Raises:
        SparsePatchError: the model is missing or its context is too short, or the configuration is not valid.
    """
    settings = load_config(config)
    model, tokenizer = load_model(model_path)
    check_context(model, length, _ANSWER_TOKENS, "--length")
    try:
        document = needle_document(tokenizer, length, needles, seed)
    except TaskError as error:
        raise TaskError(f"--length: {error}") from None
    talk = _Talk(model, tokenizer, document)
    dense, sparse = Run(), Run()
    step("warm-up")
    talk.warm_up(settings)
    for repeat in range(1, repeats + 1):
        step(f"dense prefill {repeat}/{repeats}")
        start = talk.read(dense)
        if repeat == repeats:
            step("dense answers")
            dense.answers = list(talk.answers(start))
        step(f"sparse prefill {repeat}/{repeats}")
        with patched(model, settings), capture_plans(model) as plans:
            start = talk.read(sparse)
            prefill_report = sparsity_report(model)
            captured = {layer: list(calls) for layer, calls in plans.items()}
            if repeat == repeats:
                step("sparse answers")
                sparse.answers = list(talk.answers(start))
            report = sparsity_report(model)
    return DemoResult(length, seed, settings, document, dense, sparse, prefill_report, report, captured)


def show(result: DemoResult, console: Console) -> None:
    """Print the answers and the comparison."""
    answers = Table(title=f"{len(result.document.questions)} needles in {result.length} tokens", title_justify="left")
    for column in ("depth", "key", "expected", "dense", "sparse"):
        answers.add_column(column, justify="left" if column == "key" else "right")
    for row in result.summary()["questions"]:
        answers.add_row(f"{row['depth']:.2f}", row["key"], row["expected"], row["dense"], row["sparse"])
    comparison = Table(title=f"{result.config.source} against dense attention", title_justify="left")
    for column in ("", "exact match", "prefill s", "density", "speed-up"):
        comparison.add_column(column, justify="right")
    for name, run, density, speedup in (
        ("dense", result.dense, 1.0, 1.0),
        ("sparse", result.sparse, result.prefill_report.density() or 1.0, result.speedup),
    ):
        match, seconds = result.exact_match(run), median(run.prefill_s)
        comparison.add_row(name, f"{match:.2f}", f"{seconds:.2f}", f"{density:.3f}", f"{speedup:.2f}")
    console.print(result.report.table(), *result.report.notes(), answers, comparison, sep="\n")


class _Talk:
    """Questions about one document. The first one ends the prompt; the others replace it on the same cache."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, document: NeedleDocument) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.document: list[int] = tokenizer(document.text, verbose=False)["input_ids"]
        self.questions: list[list[int]] = [
            tokenizer(question.text, add_special_tokens=False)["input_ids"] for question in document.questions
        ]

    def warm_up(self, settings: PatchConfig) -> None:
        prefill(self.model, self.document[:_WARM_UP_TOKENS])
        with patched(self.model, settings):
            prefill(self.model, self.document[:_WARM_UP_TOKENS])

    def read(self, run: Run) -> Prefilled:
        """Prefill the document and the first question, and record the time."""
        start = prefill(self.model, self.document + self.questions[0])
        run.prefill_s.append(start.seconds)
        return start

    def answers(self, start: Prefilled) -> Iterator[str]:
        """Yield the greedy answers, each up to a full stop."""
        logits, cache = start.logits[-1], start.cache
        for number, question in enumerate(self.questions):
            if number:
                cache.crop(len(self.document) - cache.get_seq_length())  # negative: tokens to drop
                logits = forward(self.model, question, cache)[-1]
            text = ""
            for _ in range(_ANSWER_TOKENS):
                token = int(logits.argmax())
                text += self.tokenizer.decode([token])
                if token == self.tokenizer.eos_token_id or "." in text:
                    break
                logits = forward(self.model, [token], cache)[-1]
            yield text.split(".")[0].strip()
