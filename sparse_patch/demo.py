"""The main job on the shipped model: a long document, questions about it, dense attention against sparse."""

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from sparse_patch.config import PatchConfig, load_config
from sparse_patch.errors import SparsePatchError
from sparse_patch.evaluation.tasks import NeedleDocument, needle_document
from sparse_patch.patching import capture_plans, patched, sparsity_report
from sparse_patch.plots import Captured
from sparse_patch.report import SparsityReport

_ANSWER_TOKENS = 12
_WARM_UP_TOKENS = 6144  # long enough that the sparse path runs too

Step = Callable[[str], None]


@dataclass
class Run:
    """One way of answering, dense or sparse: the answers, and the seconds of each prefill."""

    answers: list[str] = field(default_factory=list)
    prefill_s: list[float] = field(default_factory=list)


@dataclass
class DemoResult:
    """What the demo measured; `summary()` is its JSON."""

    length: int
    seed: int
    config: PatchConfig
    document: NeedleDocument
    dense: Run
    sparse: Run
    prefill_report: SparsityReport  # of the long prefill alone
    report: SparsityReport  # of the answers as well
    plans: Captured  # of the long prefill

    @property
    def speedup(self) -> float:
        return median(self.dense.prefill_s) / median(self.sparse.prefill_s)

    def exact_match(self, run: Run) -> float:
        right = [answer == q.answer for answer, q in zip(run.answers, self.document.questions, strict=True)]
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
                {"key": q.key, "depth": q.depth, "expected": q.answer, "dense": dense, "sparse": sparse}
                for q, dense, sparse in zip(
                    self.document.questions, self.dense.answers, self.sparse.answers, strict=True
                )
            ],
            "machine": {**_machine(), **self.report.versions},
        }


def run_demo(
    model_path: str | Path, config: str, length: int, seed: int, needles: int = 8, repeats: int = 3, step: Step = print
) -> DemoResult:
    """Answer questions about a document of `length` tokens, with dense and with sparse prefill, and time both.

    Each prefill is timed `repeats` times, dense and sparse in turn, after a warm-up of both. The first question ends
    the prompt; the others are asked as further turns on the same KV cache.

    Raises:
        SparsePatchError: the model is not there or its context is too short, or the configuration is not valid.
    """
    settings = load_config(config)
    model, tokenizer = load_model(model_path)
    context = model.config.get_text_config().max_position_embeddings
    if length + _ANSWER_TOKENS > context:
        raise SparsePatchError(f"--length: {length} tokens and the answer do not fit the model's context of {context}")
    try:
        document = needle_document(tokenizer, length, needles, seed)
    except ValueError as error:
        raise SparsePatchError(f"--length: {error}") from None
    dense, sparse = Run(), Run()
    step("warm-up")
    _warm_up(model, document, settings)
    for repeat in range(1, repeats + 1):
        step(f"dense prefill {repeat}/{repeats}")
        logits, cache = _timed_prefill(model, document, dense)
        if repeat == repeats:
            step("dense answers")
            dense.answers = list(_answers(model, tokenizer, document, logits, cache))
        step(f"sparse prefill {repeat}/{repeats}")
        with patched(model, settings), capture_plans(model) as plans:
            logits, cache = _timed_prefill(model, document, sparse)
            prefill = sparsity_report(model)
            captured = {layer: list(calls) for layer, calls in plans.items()}
            if repeat == repeats:
                step("sparse answers")
                sparse.answers = list(_answers(model, tokenizer, document, logits, cache))
            report = sparsity_report(model)
    return DemoResult(length, seed, settings, document, dense, sparse, prefill, report, captured)


def load_model(path: str | Path) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer from a local folder or a hub id: float32 on a CPU, bfloat16 on a GPU, evaluation mode."""
    on_gpu = torch.cuda.is_available()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16 if on_gpu else torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise SparsePatchError(f"--model: {path}: cannot be loaded: {reason}") from None
    model = model.cuda() if on_gpu else model  # type: ignore[call-arg]
    return model.eval(), tokenizer


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


@contextmanager
def progress_steps(console: Console, total: int) -> Iterator[Step]:
    """A progress bar on a terminal; nothing in a pipe."""
    columns = (TextColumn("{task.description:24}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("loading", total=total)

        def step(description: str) -> None:
            progress.update(task, description=description, advance=1)

        yield step


def _warm_up(model: PreTrainedModel, document: NeedleDocument, settings: PatchConfig) -> None:
    tokens = document.tokens[:_WARM_UP_TOKENS]
    _forward(model, tokens, DynamicCache(config=model.config))
    with patched(model, settings):
        _forward(model, tokens, DynamicCache(config=model.config))


def _timed_prefill(model: PreTrainedModel, document: NeedleDocument, run: Run) -> tuple[torch.Tensor, DynamicCache]:
    """Prefill the document and the first question; the logits of the last token, and the cache."""
    cache = DynamicCache(config=model.config)
    _synchronize()
    start = time.perf_counter()
    logits = _forward(model, document.tokens + document.questions[0].tokens, cache)
    _synchronize()
    run.prefill_s.append(time.perf_counter() - start)
    return logits, cache


def _answers(
    model: PreTrainedModel, tokenizer: Any, document: NeedleDocument, logits: torch.Tensor, cache: DynamicCache
) -> Iterator[str]:
    """Greedy answers. The first question is in the cache; the others are asked in its place, one after the other."""
    for number, question in enumerate(document.questions):
        if number:
            cache.crop(len(document.tokens) - cache.get_seq_length())  # negative: tokens to drop
            logits = _forward(model, question.tokens, cache)
        text = ""
        for _ in range(_ANSWER_TOKENS):
            token = int(logits.argmax())
            text += tokenizer.decode([token])
            if token == tokenizer.eos_token_id or "." in text:
                break
            logits = _forward(model, [token], cache)
        yield text.split(".")[0].strip()


@torch.no_grad()
def _forward(model: PreTrainedModel, tokens: list[int], cache: DynamicCache) -> torch.Tensor:
    """Feed tokens after what the cache holds; the logits of the last one."""
    ids = torch.tensor([tokens], device=model.device)
    logits: torch.Tensor = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
    return logits[0, -1]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _machine() -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def _processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
