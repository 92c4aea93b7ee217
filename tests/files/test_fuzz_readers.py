"""Any content of users' files and dicts: a reader gives a value, or refuses in one line of at most 500 characters.

A run has 2,000 cases, the same each time. `FUZZ_CASES=20000` tries that many, and others.
"""

import copy
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from sparse_patch import load_config, packaged_configs
from sparse_patch.artefacts.base import Header
from sparse_patch.cli.recipes import load_recipe
from sparse_patch.config import PatchConfig
from sparse_patch.errors import SparsePatchError
from sparse_patch.methods.base.registry import registry
from sparse_patch.model_shape import ModelShape
from sparse_patch.models.minicpm import minicpm_config
from sparse_patch.tensor_parallel import ALL_HEADS

ROOT = Path(__file__).parents[2]
CASES = int(os.environ.get("FUZZ_CASES", "2000"))
SHAPE = ModelShape("llama", num_layers=4, num_heads=4, num_kv_heads=2, hidden_size=64)


def cases(share: float) -> settings:
    return settings(
        max_examples=round(CASES * share),
        derandomize="FUZZ_CASES" not in os.environ,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# --- what is strange -------------------------------------------------------------------------------------------------

ODD_TEXTS = (
    *("2001-99-99", "!!int foo", "0x_", "!!bool x", "!!timestamp x", "!!binary =é", "!!python/object:os.system x"),
    *("9" * 5000, "1" + "0" * 30, "-1", "1e400", "1.0e+400", ".nan", "-.inf", "NaN", "-Infinity", "1:2:3", "0.5", "7"),
    *("[" * 900, "{" * 40, "[" * 40 + "]" * 40, "&a [*a]", "*a", "&a x", "<<: *a", "<<: {a: 1}", "? [a]\n: b\n"),
    *("\n---\n", "\n...\n", "\n", "\t", "\r", "\0", "\x07", "\x85", "\u2028", "\ufeff", "'", '"', ": ", "- ", ",", "]"),
    *("x" * 100_000, '"a\\nb": 1', '"\\ud800"', "null", "~", "yes", "''", "{}", "[]", "#", "|", ">", "@", "%TAG ! x\n"),
    *("method: dense\n", "layers: [0]\n", "full: [0]", "a: &a [0,0,0]\nb: &b [*a,*a,*a]\nc: [*b,*b,*b]\n"),
)


class Unspeakable:
    """Its repr raises."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


class Talkative:
    """Its repr is long and has several lines."""

    def __repr__(self) -> str:
        return "talk\n" * 50_000


def looped() -> tuple[Any, Any]:
    cyclic_list: list[Any] = []
    cyclic_list.append(cyclic_list)
    cyclic_dict: dict[str, Any] = {}
    cyclic_dict["a"] = cyclic_dict
    return cyclic_list, cyclic_dict


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


PLAIN = (
    *(
        None,
        True,
        -1,
        0,
        1,
        7,
        2**31,
        10**30,
        10**400,
        -(10**30),
        0.5,
        1e14,
        -1e300,
        5e-324,
        float("nan"),
        float("inf"),
    ),
    *("", "a", "a\nb", "x" * 100_000, "\0", "all", "llama", [], {}, [[]], [0, 1], ["a"], {"a": 1}, nested(100)),
    *([10**30], [-1, True], {"exclude": [9]}, {"full": [0], "select": [1]}, [0.0] * 3, [[1e14] * 2] * 4),
)
OBJECTS = (
    *(10**5000, "\ud800", b"\xff", (1, 2), {1}, frozenset(), object(), Path("a"), torch.zeros(3), torch.tensor(1)),
    *(Unspeakable(), Talkative(), [Talkative()], {Unspeakable(): 1}, {3: 4}, {None: {}}, list, 1j, *looped()),
)


def one_of(values: Sequence[Any]) -> st.SearchStrategy[Any]:
    """A copy of one of some values, which may be changed. It is chosen by its index: its repr may be long or raise."""
    return st.integers(0, len(values) - 1).map(lambda number: copy.deepcopy(values[number]))


# --- how files are changed -------------------------------------------------------------------------------------------


@st.composite
def changed_text(draw: st.DrawFn, text: str) -> str:
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(start + 12, len(text))))
        odd = draw(one_of(ODD_TEXTS) | st.text(max_size=4))
        kind = draw(st.sampled_from(("insert", "replace", "scalar", "line twice", "key twice", "cut", "drop")))
        words = list(re.finditer(r"[\w.+-]+", text))
        lines = text.splitlines(keepends=True)
        if kind == "insert":
            text = text[:start] + odd + text[start:]
        elif kind == "replace":
            text = text[:start] + odd + text[end:]
        elif kind == "scalar" and words:
            word = draw(st.sampled_from(words))
            text = text[: word.start()] + odd + text[word.end() :]
        elif kind == "line twice" and lines:
            number = draw(st.integers(0, len(lines) - 1))
            text = "".join((*lines[: number + 1], *lines[number:]))
        elif kind == "key twice":
            text = re.sub(r'("\w+": [^,{}\[\]]+,)', r"\1 \1", text, count=1)
        elif kind == "cut":
            text = text[:start]
        else:
            text = text[:start] + text[end:]
    return text


@st.composite
def changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    kind = draw(st.sampled_from(("cut", "byte", "insert", "header", "random")))
    at = draw(st.integers(0, len(data) - 1))
    if kind == "cut":
        return data[:at]
    if kind == "byte":
        return data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
    if kind == "insert":
        return data[:at] + draw(st.binary(max_size=8)) + data[at:]
    if kind == "header":
        length = draw(st.sampled_from((0, 1, 2**32, 2**63, 2**64 - 1)) | st.integers(0, len(data)))
        return length.to_bytes(8, "little") + data[8:]
    return draw(st.binary(max_size=200))


def places(value: Any, levels: int = 6) -> list[tuple[Any, Any]]:
    """Containers and keys in a value."""
    if not isinstance(value, dict | list) or levels == 0:
        return []
    keys = list(value) if isinstance(value, dict) else range(len(value))
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key], levels - 1)]


@st.composite
def changed_value(draw: st.DrawFn, value: Any, odd: tuple[Any, ...]) -> Any:
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 2))):
        found = places(value)
        if not found:
            return draw(one_of(odd))
        container, key = found[draw(st.integers(0, len(found) - 1))]
        kind = draw(st.sampled_from(("replace", "replace", "drop", "more", "deeper")))
        if kind == "replace":
            container[key] = draw(one_of(odd))
        elif kind == "drop":
            del container[key]
        elif kind == "more" and isinstance(container, dict):
            container[draw(one_of(("3", "a\nb", "x" * 100_000, "layers", "gama", "1")))] = container[key]
        else:
            container[key] = [container[key]]
    return value


# --- what is read ----------------------------------------------------------------------------------------------------


def used(config: PatchConfig) -> None:
    """What a model asks of a configuration when it is patched, and what the configuration says about itself."""
    config.fingerprint()
    resolved = config.bind(SHAPE)
    for phase in ("prefill", "decode"):
        layers = resolved.settings.layers(phase, SHAPE.num_layers)
        if method := resolved.method(phase):
            method.remark()
            _ = [method.role(layer) for layer in layers]
            if keeps := method.retention:
                heads = SHAPE.num_kv_heads
                _ = [keeps.spans_of(ALL_HEADS, layer, length, heads) for layer in layers for length in (1, 2**20)]


def check(read: Callable[[], Any]) -> None:
    try:
        read()
    except SparsePatchError as error:
        message = str(error)
        assert message and len(message.splitlines()) == 1 and message.isprintable(), repr(message[:1000])
        assert len(f"error: {message}") <= 500, message


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


TEXTS = [path.read_text() for path in packaged_configs().values()]
TEXTS += ["decode: {method: delta, roles: {full: [0], select: [1]}, calibration: null}", "both: {method: moa}"]
RECIPES = [path.read_text() for path in sorted((ROOT / "recipes").rglob("*.yaml")) if "commands:" in path.read_text()]
DATA = [yaml.safe_load(text) for text in TEXTS]
SETTINGS = [
    {
        method.phases[0]: method().model_dump()
        | ({"roles": {"full": [0], "select": [1]}} if "roles" in method.model_fields else {})
    }  # type: ignore[call-arg]
    for method in registry().values()
]
MINICPM = {
    **{"model_type": "minicpm", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5},
    **{"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16, "rope_theta": 1e4, "torch_dtype": "float32"},
    "rope_scaling": {
        **{"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        "original_max_position_embeddings": 256,
    },
    "sparse_config": {"kernel_size": 32, "topk": 64},
}
ROLES = {"model": {"model_type": "llama", "num_layers": 4, "num_heads": 4, "hidden_size": 64}, "full": [0]}
SPANS: dict[str, Any] = {"format": "per-head-span/1", "model_type": "llama", "num_layers": 4, "num_query_heads": 4}
SPANS |= {"num_kv_heads": 2, "sink": 64, "block": 64, "min_span": 128, "provenance": {"density": 0.5}}
SPANS |= {"alphas": [[0.0, 320]] * 4, "betas": [[1, 0.25]] * 4, "length_policy": "total", "prefill": "sparse"}
EARLIER = ("format", "model_type", "num_layers", "num_query_heads", "num_kv_heads", "provenance", "model")
ARTEFACTS: dict[str, Any] = {
    "minference": [{"0": ["vertical_and_slash", 1000, 6096, 0.9], "3": ["stream_llm", 1024, 4096, 1]}, {}, {}, {}],
    "moa": SPANS,
    "duoattention": {**SPANS, "length_policy": "current"},
    "published": {"alphas": [[0.0, 64, 128, 256]] * 4, "betas": [[1, 0.5, 0.25, 0]] * 4},
    "delta": {**ROLES, "select": [1], "found": {"mass": [0.5, {"worst": 0.1}]}},
}
for kind, name in (("minference", "minference"), ("moa", "moa"), ("layers", "delta")):
    body = ARTEFACTS[name] if isinstance(ARTEFACTS[name], dict) else {"layers": ARTEFACTS[name]}
    kept = {key: value for key, value in body.items() if key not in EARLIER}
    ARTEFACTS[f"{name}, with a header"] = {**Header.of(kind, SHAPE, {"seed": 0}, "tiny").entry(), **kept}
GATES = "\n".join("\t".join(map(str, row)) for row in [[0.1, 0.9], [0.5, 0.5], [0, 1], [1e-3, -0.2]])
METADATA = {"model_type": "llama", "num_layers": "4", "num_heads": "4", "num_kv_heads": "2", "hidden_size": "64"}
METADATA |= {"numerics": "int8", "local_window": "128", "block_size": "64", "error": "0.4", "sparse_patch": "0.1.0"}
SEARCH = {"numerics": "int8", "window": 128, "block_size": 64, "error": 0.4}


def load_artefact(method: str, path: Path) -> None:
    phase = registry()[method].phases[0]
    used(load_config({phase: {"method": method, "calibration": str(path)}}))


@cases(0.25)
@given(text=one_of(TEXTS).flatmap(changed_text))
def test_the_text_of_configurations(folder: Path, text: str) -> None:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8", errors="replace", newline="")
    check(lambda: used(load_config(path)))


@cases(0.1)
@given(data=one_of(DATA + SETTINGS).flatmap(lambda data: changed_value(data, PLAIN)))
def test_the_values_of_configurations(folder: Path, data: Any) -> None:
    path = folder / "values.yaml"
    path.write_text(json.dumps(data), encoding="utf-8")  # JSON is YAML
    check(lambda: used(load_config(path)))


@cases(0.15)
@given(data=one_of(DATA + SETTINGS).flatmap(lambda data: changed_value(data, PLAIN + OBJECTS)))
def test_dicts(data: Any) -> None:
    check(lambda: used(load_config(data)))


@cases(0.1)
@given(
    value=one_of(SETTINGS).flatmap(lambda data: changed_value(data, PLAIN + OBJECTS)),
    key=one_of(("prefill", "decode", "both", "backend", "dense", "x" * 100_000, "a\nb")),
    source=one_of((*packaged_configs(), "x" * 100_000, "a\0b", "a\nb.yaml", "/dev/zero", ".", *OBJECTS)),
)
def test_overrides(value: Any, key: str, source: Any) -> None:
    inner = next(iter(value.values()), None) if isinstance(value, dict) else value
    check(lambda: used(load_config(source, **{key: inner})))


@cases(0.1)
@given(name=st.sampled_from(sorted(ARTEFACTS)), data=st.data())
def test_the_text_of_artefacts(folder: Path, name: str, data: st.DataObject) -> None:
    path = folder / "artefact.json"
    path.write_text(data.draw(changed_text(json.dumps(ARTEFACTS[name], indent=1))), encoding="utf-8", errors="replace")
    check(lambda: load_artefact("moa" if name == "published" else name.partition(",")[0], path))


@cases(0.1)
@given(name=st.sampled_from(sorted(ARTEFACTS)), data=st.data())
def test_the_values_of_artefacts(folder: Path, name: str, data: st.DataObject) -> None:
    path = folder / "artefact.json"
    path.write_text(json.dumps(data.draw(changed_value(ARTEFACTS[name], PLAIN))), encoding="utf-8")
    check(lambda: load_artefact("moa" if name == "published" else name.partition(",")[0], path))


@cases(0.05)
@given(text=changed_text(GATES))
def test_gates(folder: Path, text: str) -> None:
    path = folder / "gates.tsv"
    path.write_text(text, encoding="utf-8", errors="replace")
    check(lambda: load_artefact("duoattention", path))


@cases(0.05)
@given(data=st.data())
def test_thresholds(folder: Path, data: st.DataObject) -> None:
    path = folder / "sale.safetensors"
    said = {
        **METADATA,
        data.draw(st.sampled_from((*METADATA, "more"))): data.draw(
            one_of([text for text in ODD_TEXTS if "\0" not in text]) | st.text(max_size=4)
        ),
    }
    tau = torch.rand(data.draw(st.sampled_from(((4, 4), (4, 4), (4, 4), (4,), (0, 4)))))
    tau = tau.to(data.draw(st.sampled_from((torch.float32, torch.float32, torch.float32, torch.float16, torch.bool))))
    whole = save(
        {data.draw(st.sampled_from(("tau", "tau", "tau", "t\nau"))): tau}, data.draw(st.sampled_from((said, METADATA)))
    )
    path.write_bytes(data.draw(st.just(whole) | changed_bytes(whole)))
    check(lambda: load_artefact("sale", path))


@cases(0.05)
@given(data=st.data())
def test_thresholds_with_a_header(folder: Path, data: st.DataObject) -> None:
    path = folder / "sale.safetensors"
    said = Header.of("sale", SHAPE, SEARCH, "tiny").entry()["artefact"]
    text = data.draw(st.just(json.dumps(said)) | changed_value(said, PLAIN).map(json.dumps))
    text = data.draw(st.just(text) | changed_text(text)).encode(errors="replace").decode()
    path.write_bytes(save({"tau": torch.rand(4, 4)}, {"artefact": text}))
    check(lambda: load_artefact("sale", path))


@cases(0.05)
@given(text=one_of(RECIPES).flatmap(changed_text))
def test_recipes(folder: Path, text: str) -> None:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    check(lambda: load_recipe(path))


@cases(0.05)
@given(data=st.data())
def test_configs_of_minicpm(folder: Path, data: st.DataObject) -> None:
    text = json.dumps(data.draw(changed_value(MINICPM, PLAIN)))
    (folder / "config.json").write_text(data.draw(st.just(text) | changed_text(json.dumps(MINICPM, indent=1))))
    check(lambda: minicpm_config(folder))
