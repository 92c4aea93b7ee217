"""Does a model on two GPUs answer what it answers on one? With `device_map="auto"`, and with `tp_plan="auto"`.

    python benchmarks/two_gpus.py --json two-gpus.json

Every configuration reads the same prompts and generates greedily: on one GPU, on two by `device_map`, and on two by
tensor parallelism, for which the script starts itself under torchrun. The tokens, and the logits from which they were
chosen, are compared with those of one GPU, as long as the earlier tokens are the same. `device_map` changes no
computation. Tensor parallelism adds in another order, so its logits differ by rounding; if a method ranks keys, two
almost equal keys may change places. The rows `unpatched` show the effect of rounding only. The dtype is float32 by
default, so that a wrong key shows. The exit status is 1 if any tokens differ.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sparse_patch import patched, sparsity_report
from sparse_patch.bench.common import DTYPES, describe_machine
from sparse_patch.errors import said_in_one_line
from sparse_patch.files.writing import check_writable, write_file
from sparse_patch.workbench.generation import encode
from sparse_patch.workbench.tasks import TASKS

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes" / "needle-llama"
CONFIGS = [
    "flexprefill.yaml",
    *(str(RECIPES / f"{name}.yaml") for name in ("curves/sale-16", "moa-50", "delta", "tidaldecode", "lessismore")),
]
NEW_TOKENS = {"niah_multikey_2": 16, "recite": 48}  # task -> tokens to generate
UNPATCHED, ONE, SPREAD, TENSOR = "unpatched", "one GPU", "device_map", "tensor parallel"
_SHARES = {"density": ".3f", "attended": ".0f"}
PATIENCE = 60  # most seconds that a rank waits for another
LIMIT = 240  # most seconds for all configurations under tensor parallelism


@dataclass
class Outcome:
    """The result of a configuration in one process.

    Attributes:
        tokens: tokens generated after each prompt.
        logits: logits from which they were chosen, float32 `[tokens, vocabulary]` for each prompt.
        density: share of the causal triangle that prefill computed.
        attended: keys read per decoded token and layer.
        fallbacks: reason -> number of dense calls that the method could not serve.
        seconds: time of all prompts, including the compilation of kernels.
        error: why the run failed; empty if it did not.
    """

    tokens: list[list[int]] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    density: float | None = None
    attended: float | None = None
    fallbacks: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""


def main() -> int:
    """Measure, compare, print and write; see the module docstring."""
    options = _options()
    if options.rank_files:
        return _as_rank(options)
    check_writable(options.json)
    outcomes: dict[str, list[dict[str, Outcome]]] = {}
    outcomes[ONE] = [dict(_measured(_load(options, {"": _first_device()}), options, ONE))]
    spread = _load(options, "auto")
    places = {str(part): str(place) for part, place in getattr(spread, "hf_device_map", {}).items()}
    if len(set(places.values())) > 1:
        outcomes[SPREAD] = [dict(_measured(spread, options, SPREAD))]
    else:
        print(f"no {SPREAD}: everything fits on one device", file=sys.stderr)
    del spread
    outcomes[TENSOR] = _under_torchrun(options)
    rows = list(_rows(outcomes, options))
    _print(rows)
    if options.json:
        about = (__doc__ or "").split("\n")[0]
        result = {
            "about": about,
            "command": " ".join(["python", *(word for word in sys.argv if word not in ("--json", str(options.json)))]),
            "machine": {**describe_machine(), "dtype": options.dtype, "gpus": torch.cuda.device_count()},
            "model": str(options.model).removeprefix(f"{ROOT}/"),
            "length": options.length,
            "new_tokens": NEW_TOKENS,
            "device_map": places,
            "rows": rows,
        }
        write_file(options.json, json.dumps(result, indent=1) + "\n")
    return 0 if all(row["same_tokens"] for row in rows) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=ROOT / "examples" / "needle-llama", help="path or hub id")
    parser.add_argument("--config", nargs="+", default=CONFIGS, help="configurations")
    parser.add_argument("--length", type=int, default=8192, help="tokens of each prompt")
    parser.add_argument("--dtype", default="float32", choices=sorted(DTYPES))
    parser.add_argument("--static", action="store_true", help="with a static cache, whose step Transformers compiles")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--rank-files", type=Path, help=argparse.SUPPRESS)  # for processes that torchrun starts
    return parser.parse_args()


def _first_device() -> int | str:
    return 0 if torch.cuda.is_available() else "cpu"


def _load(options: argparse.Namespace, device_map: Any = None, **how: Any) -> PreTrainedModel:
    load = AutoModelForCausalLM.from_pretrained
    return load(options.model, dtype=DTYPES[options.dtype], device_map=device_map, **how).eval()


def _measured(model: PreTrainedModel, options: argparse.Namespace, way: str) -> Iterator[tuple[str, Outcome]]:
    """Yield the outcome of the unpatched model and of every configuration. The first rank prints its progress."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    samples = {name: TASKS[name].sample(tokenizer, options.length) for name in NEW_TOKENS}
    prompts = {name: encode(tokenizer, sample.prompt, sample.answer)[0] for name, sample in samples.items()}
    for config in (None, *options.config):
        name = UNPATCHED if config is None else Path(config).stem
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{way}: {name}, kernels are compiled when they first run ...", file=sys.stderr, flush=True)
        try:
            yield name, _outcome(model, config, prompts, {"cache_implementation": "static"} if options.static else {})
        except Exception as error:  # the other configurations must still run
            yield name, Outcome(error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


@torch.no_grad()
def _outcome(
    model: PreTrainedModel, config: str | None, prompts: dict[str, list[int]], cache: dict[str, str]
) -> Outcome:
    begin, outcome = time.perf_counter(), Outcome()
    with nullcontext() if config is None else patched(model, config):
        for name, prompt in prompts.items():
            ids = torch.tensor([prompt], device=model.device)
            result: Any = model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS[name],
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                **cache,
            )
            outcome.tokens.append(result.sequences[0, len(prompt) :].tolist())
            outcome.logits.append(torch.cat(result.logits).float().cpu())
        if config is not None:
            report = sparsity_report(model)
            outcome.density, outcome.attended = report.density("prefill"), report.attended("decode")
            outcome.fallbacks = report.fallbacks()
    outcome.seconds = time.perf_counter() - begin
    return outcome


def _under_torchrun(options: argparse.Namespace) -> list[dict[str, Outcome]]:
    """The outcomes of two ranks. If a rank fails, the outcomes from before the failure are kept."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += ["--master-addr", "127.0.0.1", "--master-port", "29571", __file__, "--rank-files", folder]
        command += ["--model", str(options.model), "--length", str(options.length), "--dtype", options.dtype]
        command += ["--static"] if options.static else []
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # the ranks' import paths
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        process = subprocess.Popen([*command, "--config", *options.config], env=environment)
        try:
            process.wait(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its processes
            process.wait(timeout=30)
        files = [Path(folder) / f"{rank}.pt" for rank in range(2)]
        found = [torch.load(file, weights_only=True) if file.exists() else {} for file in files]
        return [{name: Outcome(**fields) for name, fields in each.items()} for each in found]


def _as_rank(options: argparse.Namespace) -> int:
    """Run as one process under torchrun."""
    rank, on_gpu = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=PATIENCE))
    file, outcomes = options.rank_files / f"{rank}.pt", dict[str, dict[str, Any]]()
    for name, outcome in _measured(_load(options, tp_plan="auto"), options, TENSOR):
        outcomes[name] = vars(outcome)  # plain data, so that loading needs no class of ours
        torch.save(outcomes, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").rename(file)
    torch.distributed.destroy_process_group()
    return 0


def _rows(outcomes: dict[str, list[dict[str, Outcome]]], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each configuration and way. Ranks share one row, with the larger distance from one GPU."""
    for name, expected in outcomes[ONE][0].items():
        for way, processes in outcomes.items():
            missing = Outcome(error="did not run")
            yield {"config": name, "way": way, **_compared([each.get(name, missing) for each in processes], expected)}


def _compared(found: Sequence[Outcome], expected: Outcome) -> dict[str, Any]:
    for outcome in (*found, expected):
        if outcome.error:
            return {"same_tokens": False, "error": outcome.error}
    by_prompt = [zip(each.logits, each.tokens, expected.logits, expected.tokens, strict=True) for each in found]
    differences = [_differences(*prompt) for each in by_prompt for prompt in each]
    shares = [each.density for each in found if each.density is not None]
    keys = [each.attended for each in found if each.attended is not None]
    return {
        "same_tokens": all(each.tokens == expected.tokens for each in found),
        "tokens": sum(map(len, expected.tokens)),
        "largest_logit": max(float(logits.abs().max()) for logits in expected.logits),
        "prefill_logit_difference": max(first for first, _ in differences),
        "logit_difference": max(largest for _, largest in differences),
        "density": fmean(shares) if shares else None,
        "attended": fmean(keys) if keys else None,
        "fallbacks": found[0].fallbacks,
        "seconds": max(each.seconds for each in found),
    }


def _differences(
    found: torch.Tensor, tokens: list[int], expected: torch.Tensor, expected_tokens: list[int]
) -> tuple[float, float]:
    """The largest difference of the first token's logits, and of all logits that follow equal tokens."""
    pairs = enumerate(zip(tokens, expected_tokens, strict=False))
    fork = next((i for i, (token, other) in pairs if token != other), min(len(tokens), len(expected_tokens)) - 1)
    apart = (found[: fork + 1] - expected[: fork + 1]).abs().amax(-1)
    return float(apart[0]), float(apart.max())


def _print(rows: Sequence[dict[str, Any]]) -> None:
    print(
        f"{'config':<16}{'way':<17}{'tokens':<9}{'logits apart':>13}{'of prefill':>12}{'density':>10}{'attended':>10}"
    )
    for row in rows:
        if "error" in row:
            print(f"{row['config']:<16}{row['way']:<17}{row['error']}")
            continue
        numbers = f"{row['logit_difference']:>13.2e}{row['prefill_logit_difference']:>12.2e}"
        shares = "".join(f"{'' if row[key] is None else format(row[key], form):>10}" for key, form in _SHARES.items())
        same = "same" if row["same_tokens"] else "DIFFER"
        notes = "".join(f"  fallback: {reason}" for reason in row["fallbacks"])
        print(f"{row['config']:<16}{row['way']:<17}{same:<9}{numbers}{shares}  {row['seconds']:.1f} s{notes}")


if __name__ == "__main__":
    with said_in_one_line():
        sys.exit(main())
