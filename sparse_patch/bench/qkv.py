"""Queries, keys and values to time attention on: random ones, those of a real prompt, or those of a file.

A method whose density depends on the data can be timed on structured attention only, so that is recorded from a model
that reads a prompt, and brought to the shape that is asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sparse_patch.call import AttentionCall
from sparse_patch.errors import SparsePatchError, one_line, reason
from sparse_patch.integration.observe import observed
from sparse_patch.models.loading import load_model, load_tokenizer
from sparse_patch.workbench.tasks import TASKS

_TASK = "niah_multikey_2"


@dataclass(frozen=True)
class Shape:
    """Query heads, KV heads and head_dim of one attention layer."""

    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.heads},{self.kv_heads},{self.head_dim}"


@dataclass(frozen=True)
class Inputs:
    """Where the calls to time come from.

    Attributes:
        about: what queries, keys and values are, for the caption and the JSON.
        shape: of every call.
        make: a prefill call of one row, of that many tokens.
    """

    about: str
    shape: Shape
    make: Callable[[int], AttentionCall]


def random_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """Independent normal queries, keys and values."""

    def make(length: int) -> AttentionCall:
        generator = torch.Generator(device).manual_seed(0)
        q, k, v = (
            torch.randn(1, heads, length, shape.head_dim, generator=generator, dtype=dtype, device=device)
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
        )
        return _call(q, k, v, shape.head_dim**-0.5)

    return Inputs("random Q/K/V", shape, make)


def recorded_inputs(model: Path, shape: Shape, dtype: torch.dtype, device: str, lengths: Sequence[int]) -> Inputs:
    """What a model's attention gets when it reads one of the offline prompts, in another shape (see `expanded`).

    Prompts longer than the model's positions are read all the same: its answers are worthless there, the structure of
    its attention (sinks, neighbours, repeated text) is what counts here.

    Raises:
        SparsePatchError: the model cannot be loaded.
        TaskError: a length is too short for a prompt.
    """
    tokenizer, task = load_tokenizer(model), TASKS[_TASK]
    task.sample(tokenizer, min(lengths))

    def make(length: int) -> AttentionCall:
        loaded, _ = load_model(model)
        prompt = task.sample(tokenizer, length).prompt
        calls = record_calls(loaded, tokenizer(prompt, verbose=False)["input_ids"])
        return expanded(calls, shape, dtype, device)

    about = (
        f"Q/K/V of {model.name} reading one {_TASK} prompt of each length: KV heads with their query heads, evenly "
        "from its layers; dimensions are repeated to the head_dim, which leaves the logits as they were"
    )
    return Inputs(about, shape, make)


def file_inputs(path: Path, shape: Shape | None, dtype: torch.dtype, device: str, lengths: Sequence[int]) -> Inputs:
    """Calls from a safetensors file with `q` `[1, Hq, N, D]`, `k` and `v` `[1, Hkv, N, D]` of one layer after RoPE.

    The file's metadata may hold `scale`; else it is `D ** -0.5`. A shorter length takes the first tokens.

    Raises:
        SparsePatchError: the file cannot be read, holds something else, or has fewer tokens than a length.
    """
    whole = _read_call(path)
    own = Shape(whole.q.shape[1], whole.k.shape[1], whole.q.shape[-1])
    if max(lengths) > whole.kv_length:
        raise SparsePatchError(f"--qkv: {path}: has {whole.kv_length} tokens, --lengths asks for {max(lengths)}")

    def make(length: int) -> AttentionCall:
        q, k, v = (x[:, :, :length] for x in (whole.q, whole.k, whole.v))
        first = _call(q, k, v, whole.scale)
        return expanded([first], shape or own, dtype, device)

    return Inputs(f"Q/K/V of {path.name}, the first tokens of each length", shape or own, make)


@torch.no_grad()
def record_calls(model: PreTrainedModel, tokens: Sequence[int]) -> list[AttentionCall]:
    """The attention calls of a model that reads a prompt in one forward, layer by layer."""
    calls: list[AttentionCall] = []
    with observed(model, calls.append):
        model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False, logits_to_keep=1)
    return calls


def expanded(calls: Sequence[AttentionCall], shape: Shape, dtype: torch.dtype, device: str) -> AttentionCall:
    """Recorded calls as one call of another shape.

    KV heads come evenly from all KV heads of the calls, each with its own query heads, which repeat where more are
    needed. A head_dim that is a multiple of the recorded one repeats the dimensions: with the scale divided by as much,
    the logits are those that were recorded. Another head_dim keeps the structure roughly.

    Args:
        calls: calls of one row, one length and one shape.
        shape: of the result.
        dtype: of the result.
        device: of the result.
    """
    sources = [(call, head) for call in calls for head in range(call.k.shape[1])]
    chosen = [sources[head * len(sources) // shape.kv_heads] for head in range(shape.kv_heads)]
    group = range(shape.heads // shape.kv_heads)

    def stack(heads: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([_widened(head, shape.head_dim) for head in heads])[None].to(device, dtype)

    q = stack([c.q[0, head * c.group_size + i % c.group_size] for c, head in chosen for i in group])
    k, v = stack([c.k[0, head] for c, head in chosen]), stack([c.v[0, head] for c, head in chosen])
    return _call(q, k, v, calls[0].scale * calls[0].q.shape[-1] / shape.head_dim)


def _widened(head: torch.Tensor, head_dim: int) -> torch.Tensor:
    """`[N, d]` with its dimensions repeated, or cut, to `[N, head_dim]`."""
    return head.repeat(1, -(-head_dim // head.shape[-1]))[:, :head_dim]


def _call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> AttentionCall:
    """A prefill call with the strides that Transformers gives queries: the heads of a token side by side."""
    return AttentionCall(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, scale, layer=0, phase="prefill")


def _read_call(path: Path) -> AttentionCall:
    from safetensors import SafetensorError, safe_open

    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no regular file")
        with safe_open(path, framework="pt") as file:
            q, k, v = (file.get_tensor(name) for name in ("q", "k", "v"))
            scale = float((file.metadata() or {}).get("scale", q.shape[-1] ** -0.5))
    except (OSError, SafetensorError, ValueError, ZeroDivisionError) as error:
        raise SparsePatchError(f"--qkv: {one_line(path)}: cannot be read: {reason(error)}") from None
    shapes = [tuple(x.shape) for x in (q, k, v)]
    fits = all(len(s) == 4 and s[0] == 1 for s in shapes) and shapes[1] == shapes[2]
    if not fits or q.shape[2:] != k.shape[2:] or q.shape[1] % k.shape[1]:
        raise SparsePatchError(
            f"--qkv: {path}: expected q [1, Hq, N, D] and k, v [1, Hkv, N, D], got {', '.join(map(str, shapes))}"
        )
    return _call(q, k, v, scale)
