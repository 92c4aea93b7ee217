"""Reading users' files gives a value, or one bounded line with file and field; see also test_fuzz_readers.py."""

import ast
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from sparse_patch import ConfigError, load_config
from sparse_patch.cli import main
from sparse_patch.files.reading import MOST_BYTES, MOST_YAML_BYTES, parse_json, read_bytes, read_json, read_yaml
from sparse_patch.model_shape import ModelShape

ROOT = Path(__file__).parents[2]
BOMB = "a0: &a0 [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 10)
)  # 10^10 values in a kilobyte


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as error:
        read_yaml(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and message.isprintable() and len(message) <= 490, message
    return message.removeprefix(f"{path}: ")


# --- YAML ------------------------------------------------------------------------------------------------------------

GOOD = [
    ("a: 1\nb: [x, 2.5, true, null, ~]\nc: {d: 'e'}\n", {"a": 1, "b": ["x", 2.5, True, None, None], "c": {"d": "e"}}),
    ("a: 0x1F\nb: 2001-01-02x\nc: '2001-99-99'\n", {"a": 31, "b": "2001-01-02x", "c": "2001-99-99"}),
    ("a: &x {b: 1}\nc: *x\n", {"a": {"b": 1}, "c": {"b": 1}}),
    ("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}\n", {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}),
    ("a: " + "9" * 500, {"a": int("9" * 500)}),
    ("a: " + "x" * 100_000, {"a": "x" * 100_000}),
    ("", None),
]


@pytest.mark.parametrize("text, expected", GOOD, ids=[text[:20] for text, _ in GOOD])
def test_yaml_is_what_safe_load_gives(text: str, expected: Any, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    assert read_yaml(tmp_path / "a.yaml") == expected


TWICE = [
    (
        "prefill: {method: dense}\ndecode: {method: dense}\nprefill: {method: sale}\n",
        "prefill: is set twice, in lines 1 and 3",
    ),
    ("prefill:\n  method: dense\n  layers: all\n  method: dense\n", "prefill.method: is set twice, in lines 2 and 4"),
    ("both: {method: dense, method: dense}\n", "both.method: is set twice, in line 1"),
    ("a: [{b: 1}, {c: 1, 'c': 2}]\n", "a.1.c: is set twice, in line 1"),
    ("16: a\n0x10: b\n", "0x10: is set twice, in lines 1 and 2"),
    ("true: a\nyes: b\n", "yes: is set twice, in lines 1 and 2"),
    ("a: &x {b: 1}\nc: {<<: *x, <<: *x}\n", "c.<<: is set twice, in line 2"),
]


@pytest.mark.parametrize("text, message", TWICE, ids=[row[1] for row in TWICE])
def test_a_key_that_is_set_twice_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    assert refused(tmp_path / "a.yaml") == f"{message}; keep one of them"


NUMBER = "expected a number of at most 500 characters, got '99"
ODD = [
    ("prefill: 2001-99-99\n", "prefill: line 1: expected a valid timestamp, got '2001-99-99'; put text in quotes"),
    ("a:\n  b: !!int foo\n", "a.b: line 2: expected a valid int, got 'foo'; put text in quotes"),
    ("a: 0x_\n", "a: line 1: expected a valid int, got '0x_'; put text in quotes"),
    ("a: !!bool maybe\n", "a: line 1: expected a valid bool, got 'maybe'; put text in quotes"),
    ("a: !!float x\n", "a: line 1: expected a valid float, got 'x'; put text in quotes"),
    ("2001-99-99: a\n", "line 1: expected a valid timestamp, got '2001-99-99'; put text in quotes"),
    (f"a: {'9' * 5000}\n", f"a: line 1: {NUMBER}"),
    (f"a: {'9' * 100_000}\n", f"a: line 1: {NUMBER}"),
    (f"a: 1{':59' * 2000}\n", "a: line 1: expected a number of at most 500 characters, got '1:59"),
    ("[" * 900, "0.0.0"),
    ("[" * 900 + "]" * 900, "line 1: expected at most 32 levels of nesting"),
    ("a: {" * 900, "line 1: expected at most 32 levels of nesting"),
    ("- " * 900 + "a", "line 1: expected at most 32 levels of nesting"),
    (BOMB, "a4.0: line 5: expected at most 20000 values, an alias counted as all that it names"),
    ("a: &x [*x]\n", "the alias 'x' stands inside what it names"),
    ("a: *x\n", "not valid YAML: found undefined alias 'x', line 1, column 4"),
    (
        "a: !!python/object/apply:os.system [x]\n",
        "a: line 1: the tag 'tag:yaml.org,2002:python/object/apply:os.system' ",
    ),
    ("? [a, b]\n: c\n", "line 1: expected keys that are words, got a list or a mapping"),
    (
        "a: [b\n",
        "not valid YAML: while parsing a flow sequence, expected ',' or ']', but got '<stream end>', line 2, column 1",
    ),
    ("a: b\n---\nc: d\n", "not valid YAML: expected a single document in the stream, but found another document"),
    ("a: \0\n", "not valid YAML: unacceptable character #x0000"),
    (f"# {'x' * MOST_YAML_BYTES}\n", "cannot be read: it has more than 1048576 bytes"),
]


@pytest.mark.parametrize("text, message", ODD, ids=[f"{row[0][:20]!r}" for row in ODD])
def test_yaml_that_cannot_be_made_a_value_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    assert message in refused(tmp_path / "a.yaml")


def test_an_alias_bomb_takes_little_memory(tmp_path: Path) -> None:
    """The repr of its value would take gigabytes. So would a smaller bomb that is within the limits for an override."""
    (tmp_path / "a.yaml").write_text(BOMB)
    tracemalloc.start()
    try:
        refused(tmp_path / "a.yaml")
        value: Any = 0
        for _ in range(40):
            value = [value, value]
        for bad in (
            {"prefill": value},
            {"prefill": {"method": value}},
            {"prefill": {"method": "sale", "layers": value}},
        ):
            with pytest.raises(ConfigError, match=r"got (list )?\[\[\["):
                load_config(bad)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


# --- keys and values in messages -------------------------------------------------------------------------------------

LONG = "x" * 100_000
SHOWN: list[tuple[Any, str]] = [
    ({"a\nb": 1}, r"a\nb: unknown key; known keys: prefill, decode"),
    ({LONG: 1}, " ... xxx"),
    ({"prefill": {"method": "sale", "a\r\x1b[31mb": 1}}, r"prefill.a\r\x1b[31mb: unknown key"),
    ({"prefill": {"method": "sale", LONG: 1}}, "prefill.xxx"),
    ({"prefill": {"method": "a\nb"}}, r"prefill.method: expected one of "),
    ({"prefill": {"method": LONG}}, "got 'xxx"),
    ({"prefill": {"method": "sale", "tau": LONG}}, "prefill.tau: expected a valid number, got str 'xxx"),
    ({"prefill": {"method": "sale", "tau": [LONG] * 1000}}, "prefill.tau: expected a valid number, got list ['xxx"),
    (
        {"prefill": {"method": "minference", "calibration": "a\nb.json"}},
        r"prefill.calibration: a\nb.json: cannot be read",
    ),
    ({"prefill": {"method": "minference", "calibration": LONG}}, "cannot be read: File name too long"),
    ({"prefill": {"method": "minference", "calibration": "a\0b"}}, r"a\x00b: cannot be read: embedded null byte"),
    ({"both": {"method": "moa", "calibration": "a\0b"}}, r"a\x00b: cannot be read: embedded null byte"),
    ({"decode": {"method": "delta", "calibration": "a\0b"}}, r"a\x00b: cannot be read: embedded null byte"),
    ({"prefill": {"method": "sale", "calibration": "a\0b"}}, r"a\x00b: cannot be read: embedded null byte"),
    ({"backend": LONG, "prefill": {"method": "sale"}}, "backend: expected 'auto'"),
    ({"prefill": 10**5000}, "prefill: expected a method or a mapping with a `method`, got <16610 bits>"),
]


@pytest.mark.parametrize("data, message", SHOWN, ids=[row[1][:40] for row in SHOWN])
def test_what_a_message_shows_is_bounded(data: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(data).bind(ModelShape("llama", num_layers=4, num_heads=4, num_kv_heads=2, hidden_size=64))
    assert message in str(error.value), str(error.value)
    assert str(error.value).startswith("dict: ") and str(error.value).isprintable() and len(str(error.value)) <= 490


# --- paths -----------------------------------------------------------------------------------------------------------

PATHS = [
    ("x" * 5000, "xxx: cannot be read: File name too long"),
    (f"{'d/' * 3000}a.yaml", "a.yaml: cannot be read: File name too long"),
    ("a\nb.yaml", r"a\nb.yaml: "),
    ("\udcff.yaml", r"\udcff.yaml: "),
]


@pytest.mark.parametrize("path, message", PATHS, ids=["long name", "long path", "newline", "surrogate"])
@pytest.mark.parametrize("command", ["show", "run", "demo", "eval", "bench"])
def test_paths_of_the_command_line(
    path: str, message: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {
        **{"show": ["show", path], "run": ["run", path], "demo": ["demo", "--config", path]},
        **{"eval": ["eval", "--config", path], "bench": ["bench", "prefill", "--config", path]},
    }
    monkeypatch.setattr(sys, "argv", ["sparse-patch", *arguments[command]])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and len(said) <= 500, said
    assert message in said and ("cannot be read: " in said or "no such file" in said)


@pytest.mark.skipif(os.name != "posix", reason="needs pipes and devices")
def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    """Reading a pipe that nobody writes to would block; reading a device would never end."""
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", Path("/dev/zero")):
        for read in (read_bytes, read_yaml, read_json, load_config):
            with pytest.raises(ConfigError, match=rf"^{path}: cannot be read: it is not a regular file$"):
                read(path)
    with pytest.raises(ConfigError, match=rf"^{tmp_path}: cannot be read: Is a directory$"):
        read_bytes(tmp_path)


def test_files_are_read_up_to_a_limit(tmp_path: Path) -> None:
    with (tmp_path / "big").open("wb") as file:
        file.truncate(2**40)  # takes no space
    with pytest.raises(ConfigError, match=f"big: cannot be read: it has more than {MOST_BYTES} bytes"):
        read_bytes(tmp_path / "big")
    (tmp_path / "latin").write_bytes("Größe".encode("latin1"))
    with pytest.raises(ConfigError, match=r"latin: is not UTF-8 text: invalid start byte at byte 2"):
        read_yaml(tmp_path / "latin")


# --- JSON ------------------------------------------------------------------------------------------------------------

JSON = [
    ('{"a": 1,\n "a": 2}', "x: a: is set twice, in lines 1 and 2; keep one of them"),
    ('[{"b": {"c": "a:", "d": 1, "c": 2}}]', "x: 0.b.c: is set twice, in line 1; keep one of them"),
    ('{"\\u0061": 1, "a": 2}', "x: a: is set twice, in line 1; keep one of them"),
    ("[" * 900 + "]" * 900, "x: expected at most 32 levels of nesting"),
    ("[" * 100_000, "x: expected at most 32 levels of nesting"),
    ("{", "x: is not JSON"),
    ("1 2", "x: is not JSON"),
]


@pytest.mark.parametrize("text, message", JSON, ids=[text[:20] for text, _ in JSON])
def test_json_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_json(text, "x")
    assert str(error.value) == message


def test_json_that_is_read() -> None:
    assert parse_json('{"a": [1, 2.5, -Infinity, {"a": "b"}]}', "x") == {"a": [1, 2.5, float("-inf"), {"a": "b"}]}
    assert parse_json("9" * 5000, "x") == float("inf") and parse_json("9" * 300, "x") == int("9" * 300)


# --- no code ---------------------------------------------------------------------------------------------------------


RISKY = r"\.load\(|\.loads\(|unsafe_load|allow_pickle|trust_remote_code|weights_only"
OF_PICKLING = {f"tests/integration/test_{name}.py" for name in ("cache_layers", "masks", "pickling")}


def test_nothing_is_loaded_that_could_run_code() -> None:
    """In the whole repository, `torch.load` has `weights_only=True`; YAML and NumPy use loaders without objects.

    Tests of pickling read only what they have written themselves.
    """
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    loads = 0
    for name in set(files.stdout.split()) - OF_PICKLING:
        text = (ROOT / name).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if re.search(RISKY, text) else ():
            if not isinstance(node, ast.Call):
                continue
            called, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            place = f"{name}:{node.lineno}"
            assert given.get("weights_only", "True") == "True" or called.startswith("pytest."), place
            assert given.get("trust_remote_code", "False") == "False", place
            assert given.get("allow_pickle", "False") == "False", place
            assert called not in ("pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "joblib.load"), place
            if called == "torch.load":
                loads += 1
                assert "weights_only" in given, place
    assert loads >= 3
