"""Decode methods choose the same keys by kernels as in PyTorch, in padded rows of a static cache."""

import pytest
import torch
from calls import in_buffer
from decode_steps import decode_call, run

from sparse_patch.artefacts.layer_roles import Roles
from sparse_patch.call import AttentionCall
from sparse_patch.methods import Delta, Kinetics, LessIsMore, Quest, TidalDecode
from sparse_patch.methods.base.bound import BoundMethod
from sparse_patch.model_shape import ModelShape
from sparse_patch.ops.selection import framed_lists, page_scores, page_statistics, rank_merge, top_pages
from sparse_patch.ops.selection.page_statistics import update

SHAPE = ModelShape("llama", num_layers=4, num_heads=6, num_kv_heads=2, hidden_size=96)
LAYERED = {"min_length": 0, "roles": Roles(full=[0], select=[1])}
METHODS = {
    "kinetics": lambda: Kinetics(min_length=0, budget=4 + 20 + 48, window=20),
    "quest": lambda: Quest(min_length=0, budget=64),
    "quest of groups": lambda: Quest(min_length=0, budget=64, index_sharing="kv_group", current_page="added"),
    "tidaldecode": lambda: TidalDecode(**LAYERED, budget=33),
    "tidaldecode, one list": lambda: TidalDecode(**LAYERED, budget=33, index_sharing="all", force_current=False),
    "lessismore": lambda: LessIsMore(**LAYERED, budget=40),
    "delta": lambda: Delta(**LAYERED, budget=64, page_size=8, recency_pages=3),
}


def keys_read(method: BoundMethod, call: AttentionCall) -> torch.Tensor:
    forward_state: dict[object, object] = {}
    for layer in (1, 2):  # the second one reads what a layered method chose in the first one
        step = run(method, AttentionCall(**{**vars(call), "layer": layer, "forward_state": forward_state}))
    return step.mask


@pytest.mark.parametrize("name", METHODS)
def test_the_same_keys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = METHODS[name]().bind(SHAPE)
    call = in_buffer(decode_call(190, heads=(6, 2), row_starts=[0, 31, 180]), 20)
    expected = keys_read(method, call)
    for module in (framed_lists, page_scores, page_statistics, rank_merge, top_pages, update):
        monkeypatch.setattr(module, "prefers_triton", lambda _: True)
    assert torch.equal(keys_read(method, call), expected)
