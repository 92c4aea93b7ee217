"""The model that the lm-eval tests run."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def path(needle_llama_path: Path) -> str:
    return str(needle_llama_path)


@pytest.fixture(scope="module")
def tokenizer(path: str) -> Any:
    return AutoTokenizer.from_pretrained(path)
