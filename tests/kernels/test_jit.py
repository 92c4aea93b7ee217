"""Launches of a kind that a kernel remembers, and whether kinds are at least as fine as those of Triton."""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_patch.kernels import jit
from sparse_patch.kernels.jit import Kernel

BUFFER = torch.zeros(64)
NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.integers(-40, 40) | st.sampled_from([2**31 - 1, 2**31, 2**63])
TENSORS = st.builds(lambda at, dtype: BUFFER[at:].view(dtype), st.integers(0, 40), st.sampled_from([torch.float32]))
OTHERS = st.floats() | st.none() | st.tuples(st.integers(0, 3), st.integers(15, 17))


@dataclass
class Function:
    """Stands in for a `triton.JITFunction` of `(x, size, length, scale, *, BLOCK, FLAG)`."""

    launches: list[tuple[Any, ...]] = field(default_factory=list)
    compilations: int = 0

    @property
    def params(self) -> list[Any]:
        names = {"x": 0, "size": 0, "length": 0, "scale": 0, "BLOCK": 1, "FLAG": 1}
        return [
            SimpleNamespace(name=name, is_constexpr=bool(constant), do_not_specialize=name == "length")
            for name, constant in names.items()
        ]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*args: Any, **constants: Any) -> "Compiled":
            self.compilations += 1
            values = {name: value for name, value in constants.items() if name != "num_warps"}
            self.launches.append((grid, *args, *values.values()))
            return Compiled(self)

        return launch


@dataclass
class Compiled:
    function: Function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert len(grid) == 3, "a compiled kernel takes three dimensions"
        return lambda *args: self.function.launches.append((grid, *args))


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    current = [0]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    yield current


def test_a_launch_of_a_known_kind_goes_to_the_compiled_kernel(device: list[int]) -> None:
    function = Function()
    kernel = Kernel(function)

    def launch(*args: Any, grid: tuple[int, ...] = (7,), flag: bool = True, warps: int = 4) -> int:
        before = function.compilations
        kernel[grid](*args, FLAG=flag, BLOCK=64, num_warps=warps)
        return function.compilations - before

    x, y = torch.zeros(32), torch.ones(48)
    assert launch(x, 32, 5, 0.5) == 1
    assert launch(y, 48, 6, 0.5, grid=(8, 2)) == 0
    grid, tensor, *numbers = function.launches[-1]
    assert tensor is y and (grid, *numbers) == ((8, 2, 1), 48, 6, 0.5, 64, True), "constants are in their order"
    others = [
        (y.half(), 48, 6, 0.5),
        (y[1:], 48, 6, 0.5),
        (y, 47, 6, 0.5),
        (y, 1, 6, 0.5),
        (y, 2**31, 6, 0.5),
        (y, 48, 2**31, 0.5),
        (y, 48, 6, 0.25),
        (y, 48, 6, None),
    ]
    for other in others:
        assert (launch(*other), launch(*other)) == (1, 0), other
    assert (launch(y, 48, 7, 0.5, flag=False), launch(y, 48, 7, 0.5, warps=8)) == (1, 1)
    device[0] = 1
    assert (launch(y, 48, 6, 0.5), launch(y, 48, 6, 0.5)) == (1, 0)


def test_what_is_no_plain_argument_is_left_to_triton() -> None:
    function = Function()
    kernel = Kernel(function)
    for _ in range(2):
        kernel[(1,)](SimpleNamespace(), 1, 1, 1.0, BLOCK=1, FLAG=False)
        kernel[(1,)](torch.zeros(1), 1, 1, scale=1.0, BLOCK=1, FLAG=False)
    assert function.compilations == 4


def test_few_kinds_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "_MOST", 2)
    function = Function()
    kernel = Kernel(function)
    for block in (1, 2, 3, 3, 1):
        kernel[(1,)](torch.zeros(1), 1, 1, 1.0, BLOCK=block, FLAG=False)
    assert function.compilations == 4 and len(kernel._compiled) == 2


@settings(max_examples=2000, deadline=None)
@given(*(NUMBERS | TENSORS | OTHERS,) * 2)
def test_kinds_are_at_least_as_fine_as_those_of_triton(one: Any, other: Any) -> None:
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.nvidia.compiler import CUDABackend

    for specialises, place in ((True, 1), (False, 2)):
        kinds = []
        for value in (one, other):
            args = [0, 0, 0, 0.0]
            args[place] = value
            kinds.append(Kernel(Function())._kind(tuple(args), {}))
        if kinds[0] == kinds[1]:
            of_triton = [native_specialize_impl(CUDABackend, x, False, specialises, True) for x in (one, other)]
            assert of_triton[0] == of_triton[1], (one, other)


def test_the_interpreter_gets_what_triton_makes() -> None:
    made = jit.jit()(_empty)
    assert isinstance(made, Kernel) != triton.knobs.runtime.interpret


def test_every_kernel_is_made_by_jit_and_has_its_constants_last() -> None:
    kernels = {
        f"{path.name}: {node.name}": node
        for path in Path(jit.__file__).parent.parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list
    }
    assert len(kernels) > 30
    for name, node in kernels.items():
        made = node.decorator_list[0]
        assert isinstance(made, ast.Call) and ast.unparse(made.func) == "jit", name
        constants = ["constexpr" in ast.unparse(arg.annotation) if arg.annotation else False for arg in node.args.args]
        assert constants == sorted(constants), name


def _empty(x: Any, BLOCK: triton.language.constexpr) -> None:
    """A kernel that does nothing."""
