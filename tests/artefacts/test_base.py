"""Headers of artefacts in each container, and files without a header."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from sparse_patch.artefacts.base import VERSIONS, Header, MadeFor, check_shape, how_to_make
from sparse_patch.artefacts.head_schedules import HeadSchedules, read_head_schedules, write_head_schedules
from sparse_patch.artefacts.layer_roles import Calibration, Roles, read_calibration, write_calibration
from sparse_patch.artefacts.patterns import Pattern, read_patterns, write_patterns
from sparse_patch.artefacts.thresholds import read_thresholds, write_thresholds
from sparse_patch.errors import ConfigError
from sparse_patch.model_shape import ModelShape
from sparse_patch.version import __version__

ROOT = Path(__file__).parents[2]
SHAPE = ModelShape("llama", num_layers=2, num_heads=4, num_kv_heads=2, hidden_size=64)
NEEDLE = ModelShape("llama", num_layers=8, num_heads=8, num_kv_heads=2, hidden_size=384)
SETTINGS = {"numerics": "int8", "window": 32, "block_size": 64, "error": 0.4, "text": None, "lengths": [512, 1024]}
PATTERN = ("stream_llm", 20, 50, 0.25)


def header(kind: str) -> Header:
    return Header.of(kind, SHAPE, SETTINGS, "tiny")


def write_minference(path: Path) -> None:
    write_patterns(path, header("minference"), [{0: PATTERN, 3: PATTERN}, {}])


def write_sale(path: Path) -> None:
    write_thresholds(path, torch.ones(2, 4), header("sale"))


def write_layers(path: Path) -> None:
    roles = Roles(full=[0], select=[1])
    write_calibration(path, Calibration(header("layers"), roles), {"mass": 0.5, "candidates": [{"layer": 1}]})


def write_moa(path: Path) -> None:
    write_head_schedules(path, HeadSchedules.of(SHAPE, [[0, 1]] * 2, [[1, 0]] * 2, header=header("moa")))


def of_json(path: Path) -> Any:
    return json.loads(path.read_text())["artefact"]


ALL: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any], Callable[[Path], Any]]] = {
    "minference": (write_minference, read_patterns, of_json),
    "sale": (write_sale, read_thresholds, lambda path: None),
    "layers": (write_layers, read_calibration, lambda path: yaml.safe_load(path.read_text())["artefact"]),
    "moa": (write_moa, read_head_schedules, of_json),
}
KINDS = pytest.mark.parametrize("kind", ALL)


@KINDS
def test_a_file_says_what_it_is_and_for_which_model(kind: str, tmp_path: Path) -> None:
    write, read, written = ALL[kind]
    write(tmp_path / "a")
    found = read(tmp_path / "a").header
    assert found == header(kind) and found.made_by == f"sparse_patch {__version__}" and kind in VERSIONS
    assert found.settings == SETTINGS and found.model.id == "tiny"
    if kind != "sale":
        assert written(tmp_path / "a") == {
            **{"kind": kind, "version": 1, "settings": SETTINGS, "made_by": f"sparse_patch {__version__}"},
            "model": {"id": "tiny", **vars_of(SHAPE)},
        }


def vars_of(shape: ModelShape) -> dict[str, Any]:
    names = "model_type", "num_layers", "num_heads", "num_kv_heads", "hidden_size"
    return {name: getattr(shape, name) for name in names}


@KINDS
@pytest.mark.parametrize("field, value", vars_of(SHAPE).items())
def test_another_model_is_refused_with_one_message(kind: str, field: str, value: Any, tmp_path: Path) -> None:
    write, read, _ = ALL[kind]
    write(tmp_path / "a")
    other: Any = "qwen3" if field == "model_type" else 2 * value
    with pytest.raises(ConfigError) as error:
        check_shape(read(tmp_path / "a").header, ModelShape(**{**vars_of(SHAPE), field: other}), "calibration: a")
    assert str(error.value) == (
        f"calibration: a: was made for another model: {field} {value}, this one has {other}; "
        f'run "sparse-patch calibrate {kind} --model M --out FILE"'
    )
    check_shape(read(tmp_path / "a").header, SHAPE, "calibration: a")


@pytest.mark.parametrize("written, read", [("minference", "moa"), ("moa", "minference"), ("layers", "moa")])
def test_a_file_of_another_kind(written: str, read: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    ALL[written][0](path)
    if written == "layers":
        path.write_text(json.dumps(yaml.safe_load(path.read_text())))
    with pytest.raises(ConfigError) as error:
        ALL[read][1](path)
    assert str(error.value) == (
        f"calibration: {path}: artefact.kind: expected '{read}', got '{written}'; {how_to_make(read)}"
    )


def test_the_header_of_an_earlier_file_is_not_written_again(tmp_path: Path) -> None:
    """It does not say enough about the model to be read."""
    earlier = read_head_schedules(ROOT / "recipes" / "needle-llama" / "moa-50.json")
    with pytest.raises(ValueError, match=r"header: is of an earlier version of the format; use Header\.of"):
        write_head_schedules(tmp_path / "new.json", earlier)
    again = earlier.model_copy(update={"header": Header.of("moa", NEEDLE, earlier.header.settings)})
    write_head_schedules(tmp_path / "new.json", again)
    assert read_head_schedules(tmp_path / "new.json") == again


def test_only_what_a_header_says_is_compared() -> None:
    check_shape(Header.of_earlier("moa", MadeFor()), SHAPE, "here")
    with pytest.raises(ConfigError, match="num_layers 3, this one has 2"):
        check_shape(Header.of_earlier("minference", MadeFor(num_layers=3)), SHAPE, "here")


BAD: list[tuple[Any, str]] = [
    ([], "artefact: expected a mapping of kind, version, model, settings, made_by, got '[]'"),
    ({"kind": "sale"}, "artefact.version: missing; run"),
    ({"kind": "sale", "version": "1", "model": {}}, "artefact.version: expected a valid integer, got '1'"),
    ({"kind": "sale", "version": 1, "model": {"layers": 3}}, "artefact.model.layers: unknown key; known keys: "),
    ({"kind": "sale", "version": 0, "model": {}}, "artefact.version: expected 1, got '0'"),
]


@pytest.mark.parametrize("said, message", BAD, ids=[row[1][:30] for row in BAD])
def test_a_bad_header_of_safetensors(said: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t"
    save_file({"tau": torch.ones(2, 4)}, path, {"artefact": json.dumps(said)})
    with pytest.raises(ConfigError) as error:
        read_thresholds(path)
    assert str(error.value).startswith(f"calibration: {path}: {message}") and "calibrate sale" in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [("{", "metadata artefact: is not JSON"), ('{"a": 1, "a": 1}', "metadata artefact: a: is set twice")],
)
def test_a_header_that_is_no_json(text: str, message: str, tmp_path: Path) -> None:
    save_file({"tau": torch.ones(2, 4)}, tmp_path / "t", {"artefact": text})
    with pytest.raises(ConfigError, match=message):
        read_thresholds(tmp_path / "t")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"window": "32"}, "artefact.settings.window: expected a valid integer, got '32'"),
        ({"error": None}, "artefact.settings.error: expected a valid number, got 'None'"),
    ],
)
def test_settings_that_a_configuration_must_share(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    said = header("sale").entry()["artefact"]
    said["settings"] |= changes
    save_file({"tau": torch.ones(2, 4)}, tmp_path / "t", {"artefact": json.dumps(said)})
    with pytest.raises(ConfigError) as error:
        read_thresholds(tmp_path / "t")
    assert message in str(error.value)


# --- files without a header ------------------------------------------------------------------------------------------


def test_patterns_as_minference_publishes_them(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{"0": PATTERN, "3": PATTERN}, {}]))
    found = read_patterns(path)
    assert found.layers == [{0: Pattern("stream_llm", 20, 50), 3: Pattern("stream_llm", 20, 50)}, {}]
    assert found.header.model.sizes == {"num_layers": 2}
    write_minference(tmp_path / "new.json")
    assert read_patterns(tmp_path / "new.json").layers == found.layers
    assert len((tmp_path / "new.json").read_text().splitlines()) == 7, "a layer in a line"
    found.check_shape(SHAPE, "here")
    with pytest.raises(ConfigError, match=r"was made for another model: layer 0 has a head 3, this one has heads 0 to"):
        found.check_shape(ModelShape("llama", 2, 2, 2, 64), "here")


def test_patterns_with_a_header_and_no_layers(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(header("minference").entry()))
    with pytest.raises(ConfigError, match="expected a list with a mapping of heads for each layer; run"):
        read_patterns(path)


def test_the_files_of_the_recipes_are_read_and_fit_their_models() -> None:
    folder, found = ROOT / "recipes" / "needle-llama", list[Header]()
    for path in sorted((folder / "curves").glob("*.safetensors")):
        thresholds = read_thresholds(path)
        assert torch.equal(thresholds.tau, load_file(path)["tau"]) and thresholds.window == 128
        assert thresholds.header.model.id == "examples/needle-llama"
        found.append(thresholds.header)
    for name in ("moa-50.json", "one-span-50.json"):
        schedules = read_head_schedules(folder / name)
        data = json.loads((folder / name).read_text())
        assert (schedules.alphas, schedules.betas) == (data["alphas"], data["betas"])
        assert schedules.header.settings.items() <= data["provenance"].items()
        found.append(schedules.header)
    layers = read_calibration(folder / "layers.yaml")
    assert layers.layers == Roles(full=[0, 1], select=[2, 5]) and layers.header.settings["length"] == 8192
    for one in (*found, layers.header):
        check_shape(one, NEEDLE, "here")
        assert len(one.model.sizes) >= 4
    assert len(found) == 6
    for path in sorted((ROOT / "recipes" / "span-speed").glob("*.json")):
        assert read_head_schedules(path).num_layers == 32
