"""A launch as a custom op: what torch.compile assumes is what the launch returns."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.layouts import OPS, made, odd, plain
from builders.op import Size
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import sparse_patch
from sparse_patch.kernels.launch import launch_op


def rows(x: Tensor, length: int, wide: bool) -> Tensor:
    return x.new_empty(length, 4 if wide else 2)


@launch_op("example", rows)
def example(x: Tensor, length: int, wide: bool) -> Tensor:
    return rows(x, length, wide).fill_(1)


@launch_op("longer_example", rows)
def longer_example(
    x: Tensor, before: Tensor | None, length: int, scale: float, tight: bool, wide: bool = True, last: bool = False
) -> Tensor:
    return rows(x, length, wide).fill_(scale)


@launch_op("writing_example", mutates_args=("x",))
def writing_example(x: Tensor, number: float) -> None:
    x.fill_(number)


def test_a_fake_goes_by_names() -> None:
    """With arguments in the middle and at the end, defaults and keywords, the shapes are those of the launch."""
    with FakeTensorMode():
        x = torch.empty(3)
        assert example.op(x, 5, False).shape == (5, 2)
        assert longer_example.op(x, None, 5, 0.5, True, False, True).shape == (5, 2)
        assert longer_example.op(x, x, 5, 0.5, False).shape == (5, 4)
        assert longer_example.op(x, x, scale=0.5, tight=True, length=7, wide=False).shape == (7, 2)
        assert writing_example.op(x, 2.0) is None


def test_the_outputs_ask_only_for_what_the_launch_has() -> None:
    with pytest.raises(TypeError, match="the outputs of renamed need wide"):

        @launch_op("renamed_example", rows)
        def renamed(x: Tensor, length: int, broad: bool) -> Tensor:
            return rows(x, length, broad)


def test_an_eager_call_goes_past_the_op_and_a_traced_one_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, seen = torch.zeros(3), Launches()
    with seen:
        assert example(x, 5, True).shape == (5, 4)
        assert not seen.names
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert example(x, 5, True).shape == (5, 4)
        assert seen.names == {"example"}


class Launches(TorchDispatchMode):
    """Compares every launch that goes through its op with the op's fake, and keeps the names."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "sparse_patch":
            return func(*args, **(kwargs or {}))
        self.names.add(func.__name__.partition(".")[0])
        with FakeTensorMode() as mode:
            fakes = func(*tree_map_only(Tensor, mode.from_tensor, args), **(kwargs or {}))
        results = func(*args, **(kwargs or {}))
        assert list(described(fakes)) == list(described(results)), func
        return results


def described(results: Any) -> Iterator[tuple[Any, ...]]:
    for x in tree_leaves(results):
        yield (tuple(x.shape), x.dtype, x.stride(), x.device) if isinstance(x, Tensor) else (x,)


# The ops that each row of the table of layouts goes through.
LAUNCHES = {
    "block_sparse": {"block_sparse_attention"},
    "token_blocks": {"token_block_attention"},
    "page_decode": {"page_decode_attention"},
    "every page": {"page_decode_attention"},
    "span": {"span_attention"},
    "ring, one token": {"span_ring_attention"},
    "ring, more tokens": {"span_attention", "span_ring_attention"},
    "ring write": {"span_ring_write"},
    "profiles": {"query_profiles"},
    "lines": {"query_profiles", "vertical_slash_of_profiles"},
    "plan of lines": {"lists_of_lines"},
    "tokens within": {"tokens_within"},
    "means": {"block_means"},
    "antidiagonal": {"antidiagonal_masses"},
    "compressed keys": {"choose_token_blocks"},
    "block scores": {"score_blocks"},
    "page scores": {"page_scores"},
    "page bounds": {"refresh_page_bounds"},
    "page means": {"refresh_page_means"},
    "statistics' scores": {"page_statistics_scores"},
    "decisions' kernels": {"quantise_keys", "decide_blocks"},
    "top pages": {"top_pages"},
    "rank merge": {"merge_ranks"},
    "merged list": {"merged_list"},
    "framed lists": {"framed_lists"},
    "page pairs": {"add_page_pairs"},
    "compact": {"compact"},
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", LAUNCHES)
def test_fakes_and_results_are_alike(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """They agree in shape, dtype, stride and device, as if the row were traced."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    sizes = {Size(dims=(20, 12)): odd, Size(batch=1, dims=(16, 16), dtype=torch.float16): plain}
    for size, layout in list(sizes.items())[: 1 if OPS[name].slow else 2]:
        with Launches() as seen:
            OPS[name].run(made(name, size, dict.fromkeys(OPS[name].make(size), layout)), "triton")
        assert seen.names == LAUNCHES[name]


def test_every_launch_is_compared() -> None:
    """`test_fakes_and_results_are_alike` goes through every launch."""
    sources = Path(sparse_patch.__file__).parent.rglob("*.py")
    named = {name for source in sources for name in re.findall(r'@launch_op\(\s*"(\w+)"', source.read_text())}
    assert named == set().union(*LAUNCHES.values())
