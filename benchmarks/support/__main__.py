"""Measure and write: `python -m benchmarks.support`."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from benchmarks.support.page import compact, page
from benchmarks.support.probe import CASES, WRONG, measure
from benchmarks.support.rows import FAMILIES
from sparse_patch.errors import said_in_one_line
from sparse_patch.files.writing import write_file
from sparse_patch.integration.reporting import versions
from sparse_patch.methods.base.registry import registry

ROOT = Path(__file__).parents[2]
JSON, MARKDOWN = ROOT / "docs" / "support.json", ROOT / "docs" / "models.md"


def main(names: list[str]) -> None:
    """Measure everything, or the named families and methods, and write the results."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    if unknown := set(names) - set(FAMILIES) - set(registry()):
        raise SystemExit(f"{', '.join(sorted(unknown))}: no family and no method; families are {', '.join(FAMILIES)}")
    found = json.loads(JSON.read_text(encoding="utf-8"))["families"] if names else {}
    methods = [name for name in names if name in registry()]
    for name in [name for name in names if name in FAMILIES] or FAMILIES:
        kept = found[name]["methods"] if methods and name in found else {}
        found[name] = compact(measure(name, methods=methods))
        found[name]["methods"] = _in_order({**kept, **found[name]["methods"]})
        print(f"measured {name}", file=sys.stderr, flush=True)
        write({name: found[name] for name in FAMILIES if name in found})


def _in_order(methods: dict[str, Any]) -> dict[str, Any]:
    order = dict.fromkeys(("dense", *(case.small["method"] for case in CASES)))
    return {method: methods[method] for method in order if method in methods}


def write(found: dict[str, Any]) -> None:
    """Write both files; exit instead if an answer is wrong."""
    text = json.dumps({"versions": used_versions(), "families": found}, indent=1, ensure_ascii=False)
    if WRONG in text:
        raise SystemExit(f"wrong answers, they are not written:\n{text}")
    write_file(JSON, text + "\n")
    write_file(MARKDOWN, page(json.loads(text)))


def used_versions() -> dict[str, str]:
    return {name: versions()[name] for name in ("torch", "transformers")}


if __name__ == "__main__":
    with said_in_one_line():
        main(sys.argv[1:])
