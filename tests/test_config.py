"""Configurations: what loads, how it is merged, and a one-line error for everything else."""

from pathlib import Path
from typing import Any

import pytest

from sparse_patch import ConfigError, load_config, packaged_configs
from sparse_patch.methods.base.registry import registry

FLEX = "flexprefill.yaml"


def test_every_packaged_config_loads_and_names_its_method() -> None:
    assert {"dense.yaml", FLEX} <= packaged_configs().keys()
    for name in packaged_configs():
        config = load_config(name)
        methods = {method.method for method in (config.prefill, config.decode) if method}
        assert methods == set(Path(name).stem.split("+"))


def test_every_method_has_a_config_of_its_name() -> None:
    assert {f"{name}.yaml" for name in registry()} <= packaged_configs().keys()


@pytest.mark.parametrize("name", sorted(registry().keys() - {"dense"}))
def test_a_packaged_config_spells_out_every_default(name: str) -> None:
    written = packaged_configs()[f"{name}.yaml"].read_text()
    config = load_config(name)
    method = config.prefill or config.decode
    assert method == registry()[name]()
    for field in type(method).model_fields:
        assert f"\n  {field}:" in written


def test_a_combination_is_its_parts() -> None:
    config = load_config("flexprefill+delta.yaml")
    assert config.settings() == load_config(["flexprefill.yaml", "delta.yaml"]).settings()


def test_names_work_with_and_without_suffix_and_local_files_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_config("flexprefill").settings() == load_config(FLEX).settings()
    monkeypatch.chdir(tmp_path)
    (tmp_path / FLEX).write_text("prefill: {method: flexprefill, gamma: 0.5}")
    assert load_config(FLEX).prefill.gamma == 0.5  # type: ignore[union-attr]


def test_overrides_merge_into_a_phase_and_replace_another_method() -> None:
    config = load_config(FLEX, prefill={"gamma": 0.9}, backend="reference")
    assert config.prefill.gamma == 0.9 and config.prefill.tau == 0.1  # type: ignore[union-attr]
    assert config.backend == "reference"
    assert load_config(FLEX, prefill={"method": "dense"}).prefill.method == "dense"  # type: ignore[union-attr]
    assert load_config(FLEX, prefill=None, decode={"method": "dense"}).prefill is None


def test_a_list_merges_phases() -> None:
    config = load_config([FLEX, {"decode": {"method": "dense"}, "backend": "torch"}])
    assert (config.prefill.method, config.decode.method) == ("flexprefill", "dense")  # type: ignore[union-attr]
    assert config.source == "flexprefill.yaml+dict"


def test_both_stands_for_the_two_phases() -> None:
    dense = {"method": "dense", "layers": [1]}
    assert load_config({"both": dense}) == load_config({"prefill": dense, "decode": dense})
    config = load_config("dense", both={"layers": [0]}, backend="torch")
    assert config.prefill == config.decode and config.decode.layers == [0]  # type: ignore[union-attr]


def test_the_fingerprint_follows_the_settings_only() -> None:
    base = load_config(FLEX).fingerprint()
    assert load_config({"prefill": {"method": "flexprefill"}}).fingerprint() == base
    assert load_config(FLEX, prefill={"gamma": 0.94}).fingerprint() != base


@pytest.mark.parametrize(
    "layers, expected",
    [("all", {0, 1, 2, 3}), ([0, -1], {0, 3}), ({"exclude": [0, -1]}, {1, 2}), ([], set())],
    ids=str,
)
def test_layers(layers: Any, expected: set[int]) -> None:
    config = load_config(FLEX, prefill={"layers": layers})
    assert config.layers("prefill", 4) == expected
    assert config.layers("decode", 4) == set()


def test_a_layer_that_the_model_lacks() -> None:
    with pytest.raises(ConfigError, match=r"^flexprefill.yaml: prefill.layers: the model has no layer 4; .* 0 to 3$"):
        load_config(FLEX, prefill={"layers": [4]}).layers("prefill", 4)


def names(phase: str) -> str:
    return ", ".join(name for name, method in registry().items() if phase in method.phases)


BAD_SOURCES = [
    ("nope.yaml", {}, f"nope.yaml: no such file; packaged configs: {', '.join(packaged_configs())}"),
    ("flexprefil.yaml", {}, "did you mean 'flexprefill'?"),
    (3, {}, "config: expected a path, a packaged name, a dict or a method, got int 3"),
    ([], {}, "config: the list is empty"),
    ({}, {}, "dict: sets neither prefill nor decode"),
    ({"prefil": {}}, {}, "dict: prefil: unknown key, did you mean 'prefill'?"),
    ({"prefill": {"gamma": 0.9}}, {}, f"dict: prefill.method: missing; expected one of {names('prefill')}"),
    (
        {"decode": {"method": "flexprefill"}},
        {},
        f"decode.method: expected one of {names('decode')}, got 'flexprefill'",
    ),
    ([FLEX, "dense.yaml"], {}, "dense.yaml: prefill: an earlier config of the list sets it too"),
    (FLEX, {"prefill": {"gama": 0.9}}, "flexprefill.yaml: prefill.gama: unknown key, did you mean 'gamma'?"),
    (FLEX, {"prefill": {"gamma": 1.7}}, "flexprefill.yaml: prefill.gamma: expected less than or equal to 1, got"),
    (FLEX, {"prefill": {"gamma": 0}}, "prefill.gamma: expected greater than 0"),
    (FLEX, {"prefill": {"gamma": "high"}}, "prefill.gamma: expected a valid number, got str 'high'"),
    (FLEX, {"prefill": {"gamma": True}}, "prefill.gamma: expected a valid number, got bool True"),
    (FLEX, {"prefill": {"tau": float("nan")}}, "prefill.tau: expected"),
    (FLEX, {"prefill": {"block_size": 100}}, "prefill.block_size: expected 16, 32, 64 or 128, got int 100"),
    (FLEX, {"prefill": {"selection": 3}}, "prefill.selection: expected 'coverage' or 'reference', got int 3"),
    (FLEX, {"prefill": {"min_budget": 1.5}}, "prefill.min_budget: expected a valid integer, got float 1.5"),
    (FLEX, {"prefill": {"max_budget": 12}}, "prefill.max_budget: 12 is below min_budget 512; raise it or lower that"),
    (FLEX, {"prefill": {"layers": "most"}}, 'prefill.layers: expected "all", a list of layer numbers or'),
    (FLEX, {"prefill": {"layers": [1, "a"]}}, 'prefill.layers: expected "all", a list of layer numbers or'),
    (FLEX, {"prefill": {"method": 3}}, f"prefill.method: expected one of {names('prefill')}, got 3"),
    (FLEX, {"prefill": 7}, "prefill: expected a method or a mapping with a `method`, got 7"),
    (FLEX, {"backend": "tritn"}, "backend: expected 'auto', 'triton', 'flash', 'torch' or 'reference', got str"),
    (FLEX, {"dense": "fast"}, "flexprefill.yaml: dense: expected 'unpatched' or 'best', got str"),
    (FLEX, {"on_unsupported": 1}, "on_unsupported: expected 'warn', 'error' or 'silent', got int 1"),
    ({"both": {"method": "dense"}, "decode": {"method": "dense"}}, {}, "dict: decode: both sets it too; keep one"),
    ({"both": {"method": "sale"}}, {}, f"dict: decode.method: expected one of {names('decode')}, got 'sale'"),
    (FLEX, {"source": "x"}, "flexprefill.yaml: source: unknown key"),
]


@pytest.mark.parametrize("source, overrides, message", BAD_SOURCES, ids=[row[2][:50] for row in BAD_SOURCES])
def test_bad_config_is_one_line(source: Any, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(source, **overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "- a\n- b\n",
            "mapping with the keys prefill, decode, both, backend, dense, decode_graph, on_unsupported, got a list",
        ),
        ("", "got an empty file"),
        ("just text", "got a str"),
        ("a: [b\nc: :", "not valid YAML: "),
        ("3: 4", "expected keys that are strings"),
        ("prefill: {method: flexprefill, gamma: '0.9'}", "prefill.gamma: expected a valid number, got str '0.9'"),
    ],
)
def test_bad_file_is_one_line_that_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "phase, settings, message",
    [
        ("decode", {"method": "kinetics", "sinks": 4}, "decode.sinks: is called sink now"),
        ("decode", {"method": "kinetics", "local": 64}, "decode.local: is called window now"),
        ("decode", {"method": "lessismore", "sinks": 4}, "decode.sinks: is called sink now"),
        ("both", {"method": "duoattention", "recent": 256}, "prefill.recent: is called window now"),
        ("prefill", {"method": "sale", "local_window": 128}, "prefill.local_window: is called window now"),
    ],
)
def test_earlier_names_of_settings_say_what_they_are_called_now(
    phase: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^dict: {message}$"):
        load_config({phase: settings})
