"""Which layers do what, by settings, calibrations and presets; and how a list travels from layer to layer."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from decode_steps import decode_call, forward, lists_of, run

from sparse_patch import ConfigError, load_config
from sparse_patch.artefacts.layer_roles import Roles, read_calibration
from sparse_patch.errors import FieldError
from sparse_patch.methods.base.bound import BoundMethod
from sparse_patch.methods.base.layered import LayeredMethod
from sparse_patch.methods.base.settings import Excluded
from sparse_patch.methods.delta import Delta
from sparse_patch.methods.lessismore import LessIsMore
from sparse_patch.methods.tidaldecode import TidalDecode
from sparse_patch.model_shape import ModelShape
from sparse_patch.plans import Dense, PagePlan

NEEDLE = ModelShape("llama", num_layers=8, num_heads=8, num_kv_heads=2, hidden_size=384)
METHODS = pytest.mark.parametrize("method", [TidalDecode, LessIsMore, Delta])


def shape(num_layers: int, local: set[int] = frozenset()) -> ModelShape:  # type: ignore[assignment]
    return ModelShape("llama", num_layers, 4, 2, 64, frozenset(local))


def roles(method: BoundMethod, num_layers: int) -> str:
    """One letter per layer: f (full), s (selects) or a dot (sparse)."""
    letter = {"full": "f", "select": "s", "sparse": "."}
    return "".join(letter[method.role(layer)] for layer in range(num_layers))


TABLE = [
    ({"full": [0, 1, 2, 14, 22]}, set(), 28, "ffs" + 11 * "." + "s" + 7 * "." + "s" + 5 * "."),
    ({"full": [0, 1], "select": [2, 14, 22]}, set(), 28, "ffs" + 11 * "." + "s" + 7 * "." + "s" + 5 * "."),
    ({"full": [0, 1, 2], "select": [2, 4]}, set(), 6, "ffs.s."),
    ({"full": [0, 1, -1]}, set(), 5, "fs..f"),
    ({"full": [0], "select": [1, -2]}, set(), 6, "fs..s."),
    ({"full": [], "select": [0]}, set(), 3, "s.."),
    ({"full": [0, 2, 3]}, set(), 6, "s.fs.."),
    ({"full": [0, 1, 3]}, {1, 2}, 6, "fffs.."),  # the next layer with full attention after 0 is 3
    ({"full": [0, 1]}, {2, 4}, 6, "fsf.f."),
]


@METHODS
@pytest.mark.parametrize("layers, local, number, expected", TABLE, ids=[row[3] for row in TABLE])
def test_roles(method: type[LayeredMethod], layers: Any, local: set[int], number: int, expected: str) -> None:
    model = shape(number, local)
    resolved = method(roles=Roles(**layers)).bind(model)
    assert roles(resolved, number) == expected
    settings = resolved.settings
    assert settings.bind(model).settings == settings and settings.layers_of(number) == set(range(number))


BAD = [
    (
        {"full": [0, 1], "select": [3]},
        set(),
        "roles.select: layer 2 would be sparse with no selecting layer before it",
    ),
    (
        {"select": [1]},
        set(),
        "roles.select: layer 0 would be sparse with no selecting layer before it; add it to full",
    ),
    ({"full": [0], "select": []}, set(), "roles.select: layer 1 would be sparse with no selecting layer"),
    ({"full": [0, 1, 2, 3, 4, 5]}, set(), "roles.full: no layer of 6 is left to be sparse"),
    ({"full": [0], "select": [6]}, set(), "roles.select: the model has no layer 6; it has 6 layers, 0 to 5"),
    ({"full": [-7], "select": [1]}, set(), "roles.full: the model has no layer -7"),
    ({"full": [0], "select": [1, 3]}, {3}, "roles.select: layer 3 has no full attention in this model"),
]


@pytest.mark.parametrize("layers, local, message", BAD, ids=[row[2][:40] for row in BAD])
def test_roles_that_do_not_fit(layers: Any, local: set[int], message: str) -> None:
    config = load_config({"decode": {"method": "delta", "roles": layers}})
    with pytest.raises(ConfigError) as error:
        config.bind(shape(6, local))
    assert str(error.value).startswith(f"dict: decode.{message}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "roles", ["all", [0, 1], {"ful": [0]}, {"full": 0}, {"full": ["a"]}, {"exclude": [0]}], ids=str
)
def test_roles_of_the_wrong_form(roles: Any) -> None:
    with pytest.raises(ConfigError, match=r"^dict: decode.roles: expected \{full: \[numbers\], select: .*\} or null, "):
        load_config({"decode": {"method": "tidaldecode", "roles": roles}})


def test_roles_under_their_earlier_name() -> None:
    with pytest.raises(ConfigError, match=r"^dict: decode.layers: expected \"all\", .* is set by roles, got dict "):
        load_config({"decode": {"method": "delta", "layers": {"full": [0], "select": [1]}}})


def test_layers_that_are_left_out_read_everything() -> None:
    """Layers that are left out neither choose nor read a list."""
    method = Delta(roles=Roles(full=[0], select=[1, 3]), layers=Excluded(exclude=[4])).bind(shape(6))
    assert roles(method, 6) == "fs.sf." and method.settings.layers_of(6) == {0, 1, 2, 3, 5}
    with pytest.raises(FieldError, match=r"^roles.select: layer 3 is not among `layers`; add it there$"):
        Delta(roles=Roles(full=[0], select=[1, 3]), layers=[0, 1, 2, 4, 5]).bind(shape(6))


PRESETS = [
    (TidalDecode, ModelShape("llama", 32, 32, 8, 4096), [2, 13]),
    (TidalDecode, ModelShape("llama", 32, 32, 32, 4096), [2, 7]),
    (TidalDecode, ModelShape("qwen3", 36, 32, 8, 4096), [2, 12]),
    (LessIsMore, ModelShape("qwen3", 36, 32, 8, 4096), [2, 12]),
    (LessIsMore, ModelShape("qwen3", 36, 32, 8, 2560), [2, 20]),
    (Delta, ModelShape("qwen2", 28, 28, 4, 3584), [2, 14, 22]),
    (Delta, ModelShape("qwen2", 28, 12, 2, 1536), [2, 14, 22]),
    (Delta, ModelShape("qwen2", 48, 40, 8, 5120), [2, 6, 42]),
]


@pytest.mark.parametrize("method, model, select", PRESETS)
def test_a_published_choice_is_found_by_the_models_shape(
    method: type[LayeredMethod], model: ModelShape, select: list[int]
) -> None:
    assert method().bind(model).settings.roles == Roles(full=[0, 1], select=select)


def test_a_model_that_nobody_published_a_choice_for() -> None:
    with pytest.raises(ConfigError) as error:
        load_config("delta.yaml").bind(NEEDLE)
    assert str(error.value) == (
        "delta.yaml: decode.roles: no published choice for this model (llama, 8 layers); run "
        '"sparse-patch calibrate layers --model M --out FILE" and set decode.calibration: FILE'
    )


GOOD = {
    "model": {"model_type": "llama", "num_layers": 8, "num_heads": 8, "hidden_size": 384},
    "full": [0, 1],
    "select": [2, 5],
    "curve": [0.1, 0.2],
}


def written(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump({key: value for key, value in (GOOD | changes).items() if value is not None}))
    return path


def test_settings_come_before_the_calibration_and_that_before_a_preset(tmp_path: Path) -> None:
    llama_3 = ModelShape("llama", 32, 32, 8, 4096)
    model = {"model_type": "llama", "num_layers": 32, "num_heads": 32, "hidden_size": 4096}
    path = str(written(tmp_path / "layers.yaml", model=model))
    assert TidalDecode().bind(llama_3).settings.roles == Roles(full=[0, 1], select=[2, 13])
    assert TidalDecode(calibration=path).bind(llama_3).settings.roles == Roles(full=[0, 1], select=[2, 5])
    explicit = TidalDecode(calibration=path, roles=Roles(select=[0]))
    assert explicit.bind(llama_3).settings.roles == Roles(full=[], select=[0])


def test_a_calibration_is_looked_for_beside_its_config_and_changes_the_fingerprint(tmp_path: Path) -> None:
    written(tmp_path / "layers.yaml")
    (tmp_path / "my.yaml").write_text("decode: {method: delta, calibration: layers.yaml}")
    config = load_config(tmp_path / "my.yaml")
    resolved = config.bind(NEEDLE).decode
    assert resolved is not None and roles(resolved, 8) == "ffs..s.."
    before = config.fingerprint()
    written(tmp_path / "layers.yaml", select=[2, 4])
    assert load_config(tmp_path / "my.yaml").fingerprint() != before


BAD_FILES: list[tuple[dict[str, Any], str]] = [
    ({"select": None}, "select: missing; run "),
    ({"model": None}, "model: missing; run "),
    ({"full": 3}, "full: expected a list of layer numbers, got '3'"),
    ({"select": [2, "x"]}, "select: expected a list of layer numbers, got "),
    ({"select": [2, True]}, "select: expected a list of layer numbers, got "),
    ({"select": [2, 10**30]}, "select: expected a list of layer numbers, got "),
    ({"model": GOOD["model"] | {"num_heads": 10**30}}, "model.num_heads: expected 1 to 2147483647, got '1000000"),  # type: ignore[operator]
    ({"model": GOOD["model"] | {"model_type": "a\nb" * 9999}, "full": 3}, "full: expected a list of layer numbers"),  # type: ignore[operator]
    ({"model": "llama"}, "model: expected a mapping of model_type, num_layers, num_heads, hidden_size, got 'llama'"),
    ({"model": GOOD["model"] | {"num_heads": "8"}}, "model.num_heads: expected a number, got '8'"),  # type: ignore[operator]
    ({"model": GOOD["model"] | {"model_type": 1}}, "model.model_type: expected a name, got '1'"),  # type: ignore[operator]
]


@pytest.mark.parametrize("changes, message", BAD_FILES, ids=[row[1][:30] for row in BAD_FILES])
def test_a_bad_calibration_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = written(tmp_path / "layers.yaml", **changes)
    with pytest.raises(ConfigError) as error:
        load_config({"decode": {"method": "lessismore", "calibration": str(path)}})
    assert str(error.value).startswith(f"dict: decode.calibration: {path}: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "cannot be read"),
        ("[1]", "expected a mapping"),
        ("a: [", "not valid YAML"),
        ("full: 0x_", "full: line 1"),
    ],
    ids=str,
)
def test_a_file_that_is_no_calibration(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "layers.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_calibration(path)
    assert str(error.value).startswith(f"calibration: {path}: {message}") and "calibrate layers" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"model": GOOD["model"] | {"num_layers": 28}},
            "was made for another model: num_layers 28, this one has 8; run ",
        ),  # type: ignore[operator]
        ({"select": [2, 9]}, "select: the model has no layer 9; it has 8 layers, 0 to 7"),
        ({"full": [0]}, "select: layer 1 would be sparse with no selecting layer before it"),
    ],
)
def test_a_calibration_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = written(tmp_path / "layers.yaml", **changes)
    config = load_config({"decode": {"method": "delta", "calibration": str(path)}})
    with pytest.raises(ConfigError) as error:
        config.bind(NEEDLE)
    assert str(error.value).startswith(f"dict: decode.calibration: {path}: {message}")
    assert "\n" not in str(error.value)


def small(method: type[LayeredMethod], **changes: Any) -> BoundMethod:
    settings = {"min_length": 0, "budget": 160, "roles": Roles(full=[0], select=[1, 4]), **changes}
    return method(**settings).bind(shape(7))


@METHODS
def test_a_list_goes_from_a_selecting_layer_to_the_next_one(method: type[LayeredMethod]) -> None:
    steps = forward(small(method), [decode_call(400, layer=layer) for layer in range(7)])
    plans = [step.plan for step in steps]
    assert plans[0] == Dense("full layer")
    for layer in (1, 4):
        plan = plans[layer]
        assert isinstance(plan, PagePlan) and plan.pages is None and plan.wants_logits
    for step in steps[:2] + steps[4:5]:
        assert step.mask.all(), "a full or selecting layer reads everything"
    lists = {layer: lists_of(plans[layer]) for layer in (2, 3, 5, 6)}
    assert lists[2] == lists[3] and lists[5] == lists[6] and lists[2] != lists[5]
    assert not plans[2].wants_logits  # type: ignore[union-attr]


@METHODS
def test_every_forward_chooses_anew(method: type[LayeredMethod]) -> None:
    selecting = small(method)
    first, second = (
        forward(selecting, [decode_call(400, layer=layer, seed=seed) for layer in (1, 2)])[1] for seed in (0, 1)
    )
    assert lists_of(first.plan) != lists_of(second.plan)
    alone = run(selecting, decode_call(400, layer=2))
    assert alone.plan == Dense("no list: the selecting layer was dense"), "a list outlived its forward"


@METHODS
def test_a_list_for_other_heads_is_not_used(method: type[LayeredMethod]) -> None:
    selecting = small(method)
    steps = forward(selecting, [decode_call(400, layer=1, heads=(4, 4)), decode_call(400, layer=2, heads=(6, 3))])
    if method is TidalDecode:
        assert steps[1].plan == Dense("the selecting layer has another number of heads")
    else:
        assert len(lists_of(steps[1].plan)) == 1


def test_the_layers_of_a_sliding_window_model_come_from_its_config() -> None:
    from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig

    gemma = Gemma3TextConfig(num_hidden_layers=6, sliding_window_pattern=3)
    local = frozenset(number for number, kind in enumerate(gemma.layer_types) if kind != "full_attention")
    assert local and ModelShape.of(gemma, 6).local_layers == local
    assert ModelShape.of(LlamaConfig(num_hidden_layers=3), 3).local_layers == frozenset()
    assert ModelShape.of(MistralConfig(num_hidden_layers=3), 3).local_layers == {0, 1, 2}
