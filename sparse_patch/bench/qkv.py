"""Queries, keys and values to time attention on: random, recorded from a real prompt, or read from a file.

A method whose density depends on the data can only be timed on structured attention. So attention is recorded from a
model that reads a prompt, and brought to the shape that is asked for.
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
    """The source of the calls to time.

    Attributes:
        about: description of queries, keys and values, for the caption and the JSON.
        shape: shape of every call.
        make: gives a prefill call of one row with the given number of tokens.
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
    """The inputs of a model's attention as it reads one of the offline prompts, in another shape (see `expanded`).

    Prompts longer than the model's context are read too: its answers are worthless there, but only the structure of its
    attention (sinks, neighbours, repeated text) matters here.

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

    The file's metadata may hold `scale`, which is `D ** -0.5` by default. A shorter length takes the first tokens.

    Raises:
        SparsePatchError: the file cannot be read, holds something else, or has fewer tokens than one of the lengths.
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
    """Record the attention calls of a model that reads a prompt in one forward, in layer order."""
    calls: list[AttentionCall] = []
    with observed(model, calls.append):
        model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False, logits_to_keep=1)
    return calls


def expanded(calls: Sequence[AttentionCall], shape: Shape, dtype: torch.dtype, device: str) -> AttentionCall:
    """Turn recorded calls into one call of another shape.

    The KV heads are taken evenly from all KV heads of the calls. Each brings its own query heads, which repeat if more
    are needed. If head_dim is a multiple of the recorded one, the dimensions are repeated and the scale is divided by
    the same factor, so the logits are unchanged. Any other head_dim keeps the structure roughly.

    Args:
        calls: calls of one row, all of the same length and shape.
        shape: shape of the result.
        dtype: dtype of the result.
        device: device of the result.
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
    """Repeat or cut the dimensions of `[N, d]` to `[N, head_dim]`."""
    return head.repeat(1, -(-head_dim // head.shape[-1]))[:, :head_dim]


def _call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> AttentionCall:
    """A prefill call with the query strides of Transformers: the heads of a token lie side by side."""
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
