"""Commands of `sparse-patch`, run in the process of the tests."""

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

from sparse_patch.cli import main

Completed = subprocess.CompletedProcess[str]


def run(*arguments: str, cwd: Path | None = None) -> Completed:
    """Run a command in this process, because a new process needs ten seconds to start."""
    out, err, code, before = io.StringIO(), io.StringIO(), 0, Path.cwd()
    os.chdir(cwd or before)
    try:
        with mock.patch.object(sys, "argv", ["sparse-patch", *arguments]), redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os.chdir(before)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
