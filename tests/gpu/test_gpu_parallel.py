"""Two GPUs give what one gives; skipped with fewer GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import llama

from sparse_patch import patched

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
ROOT = Path(__file__).parents[2]
PREFILL = {"method": "flexprefill", "block_size": 16, "min_budget": 16, "gamma": 0.5, "min_length": 0}
DECODE = {"method": "delta", "budget": 64, "page_size": 8, "recency_pages": 2, "min_length": 0, "roles": {"full": [0]}}
CONFIG = {"prefill": PREFILL, "decode": DECODE, "on_unsupported": "error"}


def test_a_model_on_a_gpu_that_is_not_the_current_one() -> None:
    """Triton launches on the current device; the hook makes the tensors' device the current one."""
    ids = torch.randint(3, 90, (1, 200), generator=torch.Generator().manual_seed(4))
    logits = []
    for device in ("cuda:0", "cuda:1"):
        with patched(llama().to(device), CONFIG) as model:  # type: ignore[call-overload]
            result: Any = model.generate(  # type: ignore[operator]
                ids.to(device), max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        logits.append(torch.stack(result.logits).cpu())
    assert torch.cuda.current_device() == 0
    assert torch.equal(*logits)


def test_two_gpus_give_what_one_gives(tmp_path: Path) -> None:
    """With `device_map` bit for bit; with tensor parallelism except for the order of sums."""
    file, environment = tmp_path / "result.json", {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, str(ROOT / "benchmarks" / "two_gpus.py"), "--json", str(file)]
    subprocess.run(command, check=True, timeout=500, env=environment)
    rows = json.loads(file.read_text())["rows"]
    assert len({row["config"] for row in rows}) == 7 and len(rows) == 21
    for row in rows:
        assert row["same_tokens"] and not row["fallbacks"], row
        assert row["logit_difference"] <= (1e-2 if row["way"] == "tensor parallel" else 0), row
