"""Shared fixtures. Nothing here or in the tests needs a network or a GPU."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: kernels run on the CPU

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # there is a worker per core, so more threads would wait for each other

from transformers import PreTrainedModel
from transformers.utils import logging

from sparse_patch.methods.base import registry

logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _registers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the methods that a test registers."""
    monkeypatch.setattr(registry, "_registered", {})


@pytest.fixture(autouse=True)
def _gpu_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Free a finished test's memory, because the workers share one GPU."""
    yield
    if request.node.get_closest_marker("gpu"):
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Make allocated but unwritten memory NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread: for tiny models, threads cost more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_graphs() -> Iterator[None]:
    """Drop the `torch.compile` graphs of earlier tests, and of this test afterwards."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def five_layers() -> PreTrainedModel:
    """The model that the rows of the method table are resolved for."""
    from families import llama

    return llama(layers=5)


@pytest.fixture(scope="session")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that rows of the method table name, made for `five_layers`."""
    from method_table import SMALL_MODEL, write_plans

    folder = tmp_path_factory.mktemp("plans")
    write_plans(folder, SMALL_MODEL)
    return folder


@pytest.fixture(scope="session")
def needle_llama_path() -> Path:
    return Path(__file__).parent.parent / "examples" / "needle-llama"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
