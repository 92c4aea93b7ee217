"""Samples as plain data and as files of JSON lines."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparse_patch.files.writing import write_file
from sparse_patch.workbench.tasks.base import Sample


def as_json(sample: Sample) -> dict[str, Any]:
    """A sample as plain data, with its prompt."""
    return {**asdict(sample), "prompt": sample.prompt}


def export_jsonl(samples: Iterable[Sample], path: str | Path) -> int:
    """Write samples with their prompts, one JSON object per line (all or no file). Return the number of lines."""
    lines = [json.dumps(as_json(sample), ensure_ascii=False) for sample in samples]
    write_file(Path(path), "".join(f"{line}\n" for line in lines))
    return len(lines)
