"""Measure every class in its own process."""

import multiprocessing
import os
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from transformers.utils import logging

from benchmarks.families.generating import NotShrunk
from benchmarks.families.probe import RAW, Probe, description
from benchmarks.families.settings import METHODS

Found = dict[str, Any]  # the result of `measure` for a class
LIMIT = 300  # most seconds for a class


def measure(name: str, methods: Iterable[str] = METHODS) -> Found:
    """Measure one class: its tiny model and the methods by outcome, or the reason why there is no tiny model."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    try:
        probe = Probe(name)
    except NotShrunk as error:
        return {"not shrunk": str(error)}
    outcomes: dict[str, list[str]] = {}
    for method in methods:
        outcomes.setdefault(probe.method(method), []).append(method)
    if (wrong := probe.restored()) is not None:
        outcomes.setdefault(wrong, []).append("unpatched")
    return {"model": description(probe.model), "static cache": probe.alone_way.static, "methods": outcomes}


@dataclass(frozen=True)
class Job:
    """The process that measures a class."""

    name: str
    process: Any
    deadline: float

    def found(self, pipe: Connection) -> Found:
        """The result that the process sent, or how the process ended."""
        try:
            if pipe.poll():
                return self._ended(pipe.recv())
            outcome = f"{RAW}: took more than {LIMIT} s"
        except EOFError:
            self.process.join()
            outcome = f"{RAW}: the process ended with exit code {self.process.exitcode}"
        return self._ended({"model": "", "static cache": False, "methods": {outcome: list(METHODS)}})

    def _ended(self, found: Found) -> Found:
        self.process.kill()
        self.process.join()
        return found


def sweep(names: Sequence[str], jobs: int) -> Iterator[tuple[str, Found]]:
    """Yield the result of each class when it is ready. Each class has its own process, because it may crash or hang."""
    torch.set_num_threads(1)  # before any fork
    measure("LlamaForCausalLM", ["dense"])  # all forks share what the first `generate` imports and sets up
    waiting, running = deque(names), dict[Connection, Job]()
    while waiting or running:
        while waiting and len(running) < jobs:
            pipe, job = _start(waiting.popleft())
            running[pipe] = job
        ready = wait(list(running), timeout=1)
        for pipe in [pipe for pipe, job in running.items() if pipe in ready or time.monotonic() > job.deadline]:
            job = running.pop(pipe)
            yield job.name, job.found(pipe)


def _start(name: str) -> tuple[Connection, Job]:
    context = multiprocessing.get_context("fork")  # a fork has all imports already
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, name), daemon=True)
    process.start()
    sender.close()
    return receiver, Job(name, process, time.monotonic() + LIMIT)


def _send(pipe: Connection, name: str) -> None:
    with open(os.devnull, "w") as nothing:  # classes print and warn
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    pipe.send(measure(name))
