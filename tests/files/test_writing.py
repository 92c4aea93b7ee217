"""Results are written as a whole or not at all; a failure is one line, before the work if it can be foreseen."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_patch.cli import main
from sparse_patch.errors import SparsePatchError
from sparse_patch.files.writing import WriteError, append_file, check_writable, write_file
from sparse_patch.plots import check_picture

ROOT = Path(__file__).parents[2]
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full after four bytes."""
    whole = Path.write_bytes

    def write_bytes(self: Path, data: bytes) -> int:
        whole(self, data[:4])
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path, link = tmp_path / "r.json", tmp_path / "link.json"
    write_file(path, "Größe")
    assert path.read_bytes() == "Größe".encode()
    link.symlink_to(path)
    write_file(link, b"new")
    assert path.read_bytes() == b"new" and link.is_symlink(), "what a link points at is replaced"
    append_file(path, "é\n")
    append_file(tmp_path / "log", "a\n")
    assert path.read_bytes() == "newé\n".encode() and (tmp_path / "log").read_text() == "a\n"
    assert {file.name for file in tmp_path.iterdir()} == {"r.json", "link.json", "log"}


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, limited: None) -> None:
    path = tmp_path / "r.json"
    path.write_text("old")
    with pytest.raises(WriteError, match=rf"^{path}: cannot be written: No space left on device: {path}.tmp$"):
        write_file(path, "much longer")
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["r.json"]


def test_what_is_appended_is_there_whole_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    path.write_text("old\n")
    opened = Path.open

    class Full:
        """A file that takes four bytes, then no more."""

        def __init__(self, file: object) -> None:
            self.file, self.room = file, 4

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()  # type: ignore[attr-defined]

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            written, self.room = self.file.write(data[: self.room]), 0  # type: ignore[attr-defined]
            return int(written)

    monkeypatch.setattr(Path, "open", lambda self, *how, **more: Full(opened(self, *how, **more)))
    with pytest.raises(WriteError, match=rf"^{path}: cannot be written: No space left on device$"):
        append_file(path, "a whole line\n")
    monkeypatch.undo()
    assert path.read_text() == "old\n"


def unwritable(folder: Path) -> dict[str, tuple[Path, str]]:
    """Paths that nobody can write to, not even root, and why."""
    (folder / "file").touch()
    (folder / "circle").symlink_to(folder / "circle")
    return {
        "no folder": (folder / "no" / "r.json", f"{folder}/no is not a folder"),
        "a folder": (folder, "it is a folder"),
        "below a file": (folder / "file" / "r.json", f"{folder}/file is not a folder"),
        "read-only": (Path("/proc/r.json"), "No such file or directory: /proc/r.json.tmp"),
        "NUL": (folder / "a\0b", "embedded null byte"),
        "too long": (folder / ("x" * 5000), "File name too long"),
        "circle": (folder / "circle" / "r.json", "circle"),
    }


@pytest.mark.parametrize("kind", ["no folder", "a folder", "below a file", "NUL", "too long", "circle", "read-only"])
def test_what_cannot_be_written_is_seen_before(kind: str, tmp_path: Path) -> None:
    path, reason = unwritable(tmp_path)[kind]
    if kind == "read-only" and not Path("/proc/self").exists():
        pytest.skip("needs /proc")
    before = set(tmp_path.iterdir())
    for attempt in (check_writable, lambda file: write_file(file, "x")):
        with pytest.raises(WriteError) as error:
            attempt(path)
        said = str(error.value)
        assert ": cannot be written: " in said and said.isprintable() and len(said) <= 490
    with pytest.raises(WriteError) as error:
        check_writable(None, path)
    assert reason in str(error.value)
    assert set(tmp_path.iterdir()) == before


def test_a_file_is_named_once(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(WriteError, match="link: cannot be written: another result goes there; name another file"):
        check_writable(tmp_path / "a", tmp_path / "link")
    check_writable(tmp_path / "a", None, tmp_path / "b", Path("/dev/null"), Path("/dev/null"))
    assert [file.name for file in tmp_path.iterdir()] == ["link"]


def test_a_picture_has_a_format_that_can_be_drawn(tmp_path: Path) -> None:
    for name in ("a.png", "a.PDF", "a"):
        check_picture(tmp_path / name)
    with pytest.raises(SparsePatchError, match=r"a\.docx: cannot be drawn: expected one of \..*\.?png"):
        check_picture(tmp_path / "a.docx")


# --- commands --------------------------------------------------------------------------------------------------------

WRITERS = [
    (["methods", "--json"], "json"), (["tasks", "--json"], "json"), (["show", "dense", "--json"], "json"),
    (["demo", "--json"], "json"), (["demo", "--plot"], "png"),
    (["eval", "--json"], "json"), (["eval", "--plot"], "png"),
    (["export"], "jsonl"), (["bench", "prefill", "--json"], "json"), (["bench", "prefill", "--plot"], "png"),
    (["bench", "decode", "--json"], "json"), (["bench", "model", "--json"], "json"),
    (["calibrate", "minference", "--out"], "json"), (["calibrate", "sale", "--out"], "safetensors"),
    (["calibrate", "layers", "--out"], "yaml"), (["calibrate", "moa", "--out"], "json"),
    (["calibrate", "layers", "--out", "l.yaml", "--json"], "json"),
    (["calibrate", "moa", "--out", "m.json", "--plot"], "png"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, ending", WRITERS, ids=[" ".join(row[0]) for row in WRITERS])
def test_every_command_looks_before_it_runs(
    arguments: list[str],
    ending: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No model is loaded and nothing is printed; this also holds for a name of 100 kB or with a line break."""
    monkeypatch.chdir(tmp_path)
    for name in (f"no/such/r.{ending}", f"{'x' * 100_000}.{ending}", f"a\nb/r.{ending}"):
        monkeypatch.setattr(sys, "argv", ["sparse-patch", *arguments, name])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        assert stop.value.code == 2 and said.out == "" and ": cannot be written: " in said.err, said
        assert said.err.startswith("error: ") and said.err.count("\n") == 1 and len(said.err) <= 500
    assert not list(tmp_path.iterdir())


@needs_full
def test_a_full_device_is_one_line_that_says_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sparse-patch", "methods", "--json", str(FULL)])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    assert stop.value.code == 2 and "what it does" in said.out
    problem = "cannot be written: No space left on device; the table above is the result"
    assert said.err == f"error: /dev/full: {problem}\n"


@needs_full
def test_output_that_nobody_takes(tmp_path: Path) -> None:
    """A full disk under the output is an error in one line; a reader that has read enough is no error."""
    command = [sys.executable, "-m", "sparse_patch.cli", "methods"]
    with FULL.open("w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2 and result.stderr == "error: [Errno 28] No space left on device\n"
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert result.returncode == 1 and result.stderr == ""


def test_a_script_looks_before_it_runs(tmp_path: Path) -> None:
    output = "no/such/r.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "two_gpus.py"), "--json", output]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"error: {output}: cannot be written: ") and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_json_of_a_command_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sparse-patch", "methods", "--json", str(tmp_path / "m.json")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in (0, None) and len(json.loads((tmp_path / "m.json").read_text())) > 10
    assert [file.name for file in tmp_path.iterdir()] == ["m.json"]
