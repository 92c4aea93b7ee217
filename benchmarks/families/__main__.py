"""Measure and write: `python -m benchmarks.families`."""

import argparse
import difflib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tiny_models import causal_classes

from benchmarks.families.page import FAULTS, page, said, said_totals, status_of, totals_of
from benchmarks.families.sweep import Found, sweep
from sparse_patch.integration.reporting import versions

ROOT = Path(__file__).parents[2]
JSON, MARKDOWN = ROOT / "docs" / "families.json", ROOT / "docs" / "families.md"


def used_versions() -> dict[str, str]:
    return {name: versions()[name] for name in ("torch", "transformers")}


def write(families: dict[str, Found]) -> dict[str, int]:
    """Write both files and return the totals."""
    ordered = {name: families[name] for name in causal_classes() if name in families}
    result = {"versions": used_versions(), "totals": totals_of(ordered), "families": ordered}
    JSON.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    MARKDOWN.write_text(page(result), encoding="utf-8")
    return totals_of(ordered)


def full_name(name: str) -> str:
    """Return the class that a name stands for, with or without its ForCausalLM."""
    known = causal_classes()
    for found in (name, f"{name}ForCausalLM", f"{name}LMHeadModel"):
        if found in known:
            return found
    near = difflib.get_close_matches(f"{name}ForCausalLM", known, 3)
    raise SystemExit(f"{name}: no causal class of this Transformers; near: {', '.join(near) or 'none'}")


def main(arguments: list[str]) -> None:
    """Measure every class or the named ones, print a line for each, and write the results."""
    parser = argparse.ArgumentParser(description="Every causal class of Transformers with every method.")
    parser.add_argument("families", nargs="*", help="names of classes, with or without ForCausalLM; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="number of processes at a time")
    options = parser.parse_args(arguments)
    names = [full_name(name) for name in options.families]
    kept: dict[str, Found] = {}
    if names:
        before: Any = json.loads(JSON.read_text(encoding="utf-8")) if JSON.exists() else {"versions": used_versions()}
        if before["versions"]["transformers"] != used_versions()["transformers"]:
            raise SystemExit(
                f"{JSON.name} is of Transformers {before['versions']['transformers']}; measure every class"
            )
        kept = before.get("families", {})
    started = time.monotonic()
    for name, found in sweep(names or list(causal_classes()), options.jobs):
        kept[name] = found
        print(f"{status_of(found):10} {name}: {said(found)}", flush=True)
    totals = write(kept)
    print(f"{said_totals(totals)} {time.monotonic() - started:.0f} s")
    if any(totals[fault] for fault in FAULTS):
        raise SystemExit("there are faults; they are marked in docs/families.md")


if __name__ == "__main__":
    main(sys.argv[1:])
