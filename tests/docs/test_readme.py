"""The README agrees with the project."""

import json
import re
from pathlib import Path

from builders.programs import program
from transformers import AutoTokenizer

from sparse_patch.evaluation.scoring import interval
from sparse_patch.methods.base.registry import registry
from sparse_patch.workbench.generation import encode
from sparse_patch.workbench.tasks import TASKS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_results() -> None:
    assert program("update_readme").updated(README) == README, "run python benchmarks/update_readme.py"


CARD = {  # task -> line of the model card
    "niah_single_1": "one needle, noise haystack",
    "niah_single_2": "one needle, text haystack",
    "niah_single_3": "one needle, UUID value",
    "niah_multikey_1": "4 keys, text haystack",
    "niah_multikey_2": "haystack made of needles",
    "niah_multivalue": "4 values for one key, in order",
    "vt": "variable tracking, 1 chain, 4 hops",
    "recite": "recite every needle in order (long answer)",
}
PROMPTS = {4096: 12, 8192: 8}  # prompts behind the card's figures


def test_the_dense_rows_agree_with_the_model_card_within_intervals() -> None:
    """The card's figures are rounded and from another evaluation with few prompts, so both sides have an interval."""
    card = (ROOT / "examples" / "needle-llama" / "README.md").read_text(encoding="utf-8")
    result = json.loads((ROOT / "benchmarks" / "results" / "needle-llama.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "needle-llama")
    rows = [
        row for row in result["rows"] if row["config"] == "dense" and row["length"] in PROMPTS and row["task"] in CARD
    ]
    assert {row["task"] for row in rows} == set(CARD)
    for row in rows:
        line = rf"\| {re.escape(CARD[row['task']])} \| (\S+) / (\S+) \| (\S+) / (\S+) \|"
        cells = re.findall(line, card)[0]
        exact, tokens = cells[:2] if row["length"] == 4096 else cells[2:]
        sample = TASKS[row["task"]].sample(tokenizer, row["length"])
        answer = len(encode(tokenizer, sample.prompt, sample.answer)[1])
        number = PROMPTS[row["length"]]
        for figure, text, trials in (("exact_match", exact, 1), ("token_accuracy", tokens, answer)):
            successes = round(float(text) * number * trials)
            card_low, card_high = interval([successes], [number * trials])
            low, high = row[f"{figure}_ci"]
            assert low <= card_high and card_low <= high, (row["task"], row["length"], figure, text, low, high)


def test_the_committed_run_has_dense_and_two_settings() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "needle-llama.json").read_text(encoding="utf-8"))
    assert set(result["configs"]) >= {"dense", "flexprefill", "flexprefill-fast"}
    assert all(row["fallbacks"] == {} for row in result["rows"])
    assert {row["samples"] for row in result["rows"] if row["length"] == 4096} == {10}


def test_links_and_files_exist() -> None:
    for page in (
        "README.md",
        "CONTRIBUTING.md",
        "examples/README.md",
        "recipes/README.md",
        "docs/models.md",
        "docs/families.md",
    ):
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_the_table_of_methods_is_complete() -> None:
    assert {f"`{name}.yaml`" for name in registry()} <= set(re.findall(r"`[a-z0-9_]+\.yaml`", README))
