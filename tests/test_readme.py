"""What the README says is what the project has."""

import importlib.util
import json
import re
from pathlib import Path

from sparse_patch.methods.base import registry

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_results() -> None:
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "benchmarks" / "update_readme.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.updated(README) == README, "run python benchmarks/update_readme.py"


CARD = {  # line of the model card: task
    "one needle, noise haystack": "niah_single_1",
    "one needle, text haystack": "niah_single_2",
    "one needle, UUID value": "niah_single_3",
    "4 keys, text haystack": "niah_multikey_1",
    "haystack made of needles": "niah_multikey_2",
    "4 values for one key, in order": "niah_multivalue",
    "variable tracking, 1 chain, 4 hops": "vt",
    "recite every needle in order (long answer)": "recite",
}


def test_the_dense_rows_agree_with_the_model_card_within_their_intervals() -> None:
    """The card has its figures from another evaluation, of 12 prompts at 4k and 8 at 8k, rounded."""
    card = (ROOT / "examples" / "needle-llama" / "README.md").read_text(encoding="utf-8")
    result = json.loads((ROOT / "benchmarks" / "results" / "needle-llama.json").read_text(encoding="utf-8"))
    rows = {(row["task"], row["length"]): row for row in result["rows"] if row["config"] == "dense"}
    compared = 0
    for line, task in CARD.items():
        cells = re.findall(rf"\| {re.escape(line)} \| (\S+) / (\S+) \| (\S+) / (\S+) \|", card)[0]
        for length, (exact, tokens) in {4096: cells[:2], 8192: cells[2:]}.items():
            row = rows[task, length]
            for figure, text in (("exact_match", exact), ("token_accuracy", tokens)):
                rounding = 0.5 * 10 ** -len(text.partition(".")[2])
                low, high = row[f"{figure}_ci"]
                assert low - rounding <= float(text) <= high + rounding, (task, length, figure, text, low, high)
                compared += 1
    assert compared == 32


def test_the_committed_run_has_every_length_and_two_settings() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "needle-llama.json").read_text(encoding="utf-8"))
    assert {row["length"] for row in result["rows"]} == {4096, 8192, 16384}
    assert set(result["configs"]) >= {"dense", "flexprefill", "flexprefill-fast"}
    assert all(row["fallbacks"] == {} for row in result["rows"])
    assert {row["samples"] for row in result["rows"] if row["length"] == 4096} == {10}


def test_links_and_files_exist() -> None:
    for page in ("README.md", "CONTRIBUTING.md", "examples/README.md", "recipes/README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_the_table_of_methods_is_complete() -> None:
    assert {f"`{name}.yaml`" for name in registry()} <= set(re.findall(r"`[a-z]+\.yaml`", README))
