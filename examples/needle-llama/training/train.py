# SPDX-License-Identifier: Apache-2.0
"""Train needle-llama from scratch with Muon (matrices) and AdamW (embedding and norms), in stages of growing length.

Input: the folder that prep.py writes, and the checkpoint `--ckpt` if there is one; training then continues from it.

Output: the checkpoint after each stage; at the end, in `--out`, the weights as bfloat16 safetensors in four shards,
named as `LlamaForCausalLM` names them (config.json and the tokenizer's files are not written here).

A stage is `length:batch:seconds`. Progress is counted in seconds of training, without start-up, compilation and
evaluation. The learning rate follows this progress, so two runs are never quite the same. For example:

    python train.py --data data --stages 1024:128:200,4096:32:200 --total 400 --out out

The shipped weights saw lengths of 1k, 4k, 16k and 32k in 800 seconds; the split is not recorded here.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from gen import ANSWER, TEXT, TaskGenerator

INTERMEDIATE = 1024
VOCAB_SIZE = 4096
ROPE_THETA = 1e6
NORM_EPS = 1e-5
INIT_STD = 0.02
TEXT_LOSS_WEIGHT = 0.4  # prompt and haystack count too, but less than the answers
WARMUP_SECONDS = 15
LOG_EVERY = 50
SHARDS = 4
# Short sequences come with more copying, long ones with more retrieval.
SHORT_MIX = {"niah": 6, "copy": 3, "text": 1, "vt": 2, "recite": 1}
LONG_MIX = {"niah": 8, "vt": 3, "recite": 2, "cwe": 1, "copy": 1, "text": 1.5}
SHORT_LENGTH = 1024
EVAL_TASKS = ("niah", "vt", "recite", "cwe")
EVAL_SEED = 99


@dataclass(frozen=True)
class Shape:
    """The sizes of the model that the command line can change."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: bool


@dataclass(frozen=True)
class Stage:
    """Sequence length, batch size, and the stretch of training time, in seconds, that the stage fills."""

    length: int
    batch: int
    begin: float
    end: float


class Scores(NamedTuple):
    """Losses, whether all answer tokens of each sequence are right, and the share of right answer tokens."""

    loss: Tensor
    text_loss: Tensor
    answer_loss: Tensor
    exact: Tensor
    token_accuracy: Tensor


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), NORM_EPS)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in Llama's half-split layout."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def rope_tables(length: int, head_dim: int, device: str) -> tuple[Tensor, Tensor]:
    """Cosines and sines for each position, in the dtype that the model computes in."""
    inverse = 1 / (ROPE_THETA ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim))
    angles = torch.outer(torch.arange(length, device=device).float(), inverse)
    angles = torch.cat((angles, angles), -1)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = linear(shape.hidden, shape.heads * shape.head_dim)
        self.k_proj = linear(shape.hidden, shape.kv_heads * shape.head_dim)
        self.v_proj = linear(shape.hidden, shape.kv_heads * shape.head_dim)
        self.o_proj = linear(shape.heads * shape.head_dim, shape.hidden)
        if shape.qk_norm:
            self.q_norm = RMSNorm(shape.head_dim)
            self.k_norm = RMSNorm(shape.head_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query = self.q_proj(x).view(batch, length, self.shape.heads, self.shape.head_dim)
        key = self.k_proj(x).view(batch, length, self.shape.kv_heads, self.shape.head_dim)
        value = self.v_proj(x).view(batch, length, self.shape.kv_heads, self.shape.head_dim)
        if self.shape.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(output.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gate_proj = linear(hidden, INTERMEDIATE)
        self.up_proj = linear(hidden, INTERMEDIATE)
        self.down_proj = linear(INTERMEDIATE, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape.hidden)
        self.input_layernorm = RMSNorm(shape.hidden)
        self.post_attention_layernorm = RMSNorm(shape.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    """Llama with tied embeddings. Modules have Transformers' names, so that the weights load there as they are."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB_SIZE, shape.hidden)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden)
        residual_std = INIT_STD / math.sqrt(2 * shape.layers)  # for what is added to the residual stream
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=residual_std if "o_proj" in name or "down" in name else INIT_STD)

    def forward(self, ids: Tensor, weights: Tensor, cos: Tensor, sin: Tensor) -> Scores:
        x = self.embed_tokens(ids).to(cos.dtype)
        for block in self.layers:
            x = block(x, cos, sin)
        hidden, targets, weights = self.norm(x)[:, :-1], ids[:, 1:], weights[:, 1:]
        logits = F.linear(hidden, self.embed_tokens.weight.to(hidden.dtype)).float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        is_text, is_answer = (weights == TEXT).float(), (weights == ANSWER).float()
        text_loss = (loss * is_text).sum() / is_text.sum().clamp(min=1)
        answer_loss = (loss * is_answer).sum() / is_answer.sum().clamp(min=1)
        right = logits.argmax(-1) == targets
        exact = (right | (is_answer == 0)).all(1).float()
        token_accuracy = (right * is_answer).sum() / is_answer.sum().clamp(min=1)
        return Scores(TEXT_LOSS_WEIGHT * text_loss + answer_loss, text_loss, answer_loss, exact, token_accuracy)


class TaskStream(IterableDataset):
    """Endless training sequences; each worker has its own seed."""

    def __init__(self, length: int, mix: Mapping[str, float], seed: int, data: Path) -> None:
        self.length = length
        self.mix = mix
        self.seed = seed
        self.data = data

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        worker = get_worker_info()
        generator = TaskGenerator(self.seed * 1000 + (worker.id if worker else 0), self.data)
        while True:
            yield tuple(torch.from_numpy(array.astype(np.int64)) for array in generator.sample(self.length, self.mix))


def parse_stages(text: str) -> list[Stage]:
    """Parse `length:batch:seconds,...` into consecutive stages."""
    stages: list[Stage] = []
    begin = 0.0
    for item in text.split(","):
        length, batch, seconds = item.split(":")
        stages.append(Stage(int(length), int(batch), begin, begin + float(seconds)))
        begin = stages[-1].end
    return stages


class Trainer:
    """The model, its optimizers, and the time it has been trained."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.started = time.time()
        self.args = args
        self.on_gpu = args.dev == "cuda"
        self.trained = 0.0  # seconds
        torch.manual_seed(args.seed)
        shape = Shape(args.hidden, args.layers, args.heads, args.kv, args.hd, args.qknorm)
        self.model = LanguageModel(shape).to(args.dev)
        print("params", sum(parameter.numel() for parameter in self.model.parameters()) / 1e6, "M", flush=True)
        self.muon, self.adamw = self._optimizers()
        if args.ckpt.exists():
            self._resume()
        self.forward = torch.compile(self.model, dynamic=False) if self.on_gpu else self.model

    def _optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        """Muon for the matrices; AdamW for the embedding and the vectors, which are not maps between spaces."""
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            (matrices if parameter.dim() == 2 and "embed" not in name else others).append(parameter)
        lr = self.args.lr
        # With Muon's updates scaled to AdamW's, one learning rate serves both.
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw", momentum=0.95)
        adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=self.on_gpu)
        return muon, adamw

    def _resume(self) -> None:
        checkpoint = torch.load(self.args.ckpt, map_location=self.args.dev, weights_only=True)
        self.model.load_state_dict(checkpoint["m"])
        self.muon.load_state_dict(checkpoint["o1"])
        self.adamw.load_state_dict(checkpoint["o2"])
        self.trained = checkpoint["done"]
        print("resumed at", self.trained, flush=True)

    def save_checkpoint(self) -> None:
        checkpoint = {
            "m": self.model.state_dict(),
            "o1": self.muon.state_dict(),
            "o2": self.adamw.state_dict(),
            "done": self.trained,
        }
        torch.save(checkpoint, self.args.ckpt)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.args.dev, torch.bfloat16, enabled=self.on_gpu)

    def elapsed(self) -> float:
        return time.time() - self.started

    def learning_rate(self) -> float:
        """Linear warm-up, constant to half of `--total`, then linear down to a twentieth."""
        progress = self.trained / self.args.total
        warmup = min(1, (self.trained + 1) / WARMUP_SECONDS)
        decay = 1 if progress < 0.5 else max(0.05, 1 - (progress - 0.5) / 0.5 * 0.95)
        return self.args.lr * warmup * decay

    def batches(self, index: int, stage: Stage) -> DataLoader:
        """A stage's data; the time already trained is part of the seed, so that a resumed run sees new sequences."""
        mix = SHORT_MIX if stage.length <= SHORT_LENGTH else LONG_MIX
        seed = self.args.seed * 100 + index + int(self.trained)
        return DataLoader(
            TaskStream(stage.length, mix, seed, self.args.data),
            batch_size=stage.batch,
            num_workers=self.args.workers,
            prefetch_factor=4 if self.args.workers else None,
            pin_memory=self.on_gpu,
        )

    def step(self, ids: Tensor, weights: Tensor, tables: tuple[Tensor, Tensor], lr: float) -> Tensor:
        """One update; returns the text loss, answer loss, exact match and token accuracy before it."""
        for optimizer in (self.muon, self.adamw):
            for group in optimizer.param_groups:
                group["lr"] = lr
        with self.autocast():
            scores = self.forward(ids, weights, *tables)
        scores.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in (self.muon, self.adamw):
            optimizer.step()
            optimizer.zero_grad()
        if self.on_gpu:
            torch.cuda.synchronize()  # progress is wall time
        text_loss, answer_loss = scores.text_loss.detach(), scores.answer_loss.detach()
        return torch.stack([text_loss, answer_loss, scores.exact.mean(), scores.token_accuracy])

    def train_stage(self, index: int, stage: Stage) -> bool:
        """Train until the stage's end; return True if `--budget` ran out before it."""
        tables = rope_tables(stage.length, self.args.hd, self.args.dev)
        trained_before = self.trained
        first_step_end: float | None = None
        recent: list[Tensor] = []
        for number, batch in enumerate(self.batches(index, stage), start=1):
            ids, weights = (tensor.to(self.args.dev, non_blocking=True) for tensor in batch)
            lr = self.learning_rate()
            recent.append(self.step(ids, weights, tables, lr))
            if first_step_end is None:  # the first step compiles, so it does not count
                first_step_end = time.time()
                print(f"stage L={stage.length} B={stage.batch} first step at {self.elapsed():.0f}s", flush=True)
            self.trained = trained_before + time.time() - first_step_end
            if number % LOG_EVERY == 0:
                speed = number * stage.batch * stage.length / max(1e-3, time.time() - first_step_end) / 1e6
                self._log(stage, number, lr, torch.stack(recent).mean(0).tolist(), speed)
                recent = []
            if self.elapsed() > self.args.budget:
                return True
            if self.trained >= stage.end:
                return False
        return False

    def _log(self, stage: Stage, number: int, lr: float, means: list[float], speed: float) -> None:
        text_loss, answer_loss, exact, token_accuracy = means
        print(
            f"{self.trained:6.0f}s L{stage.length} step {number} lr {lr:.4f} lm {text_loss:.3f} ans {answer_loss:.3f} "
            f"seq_ok {exact:.2f} tok {token_accuracy:.3f} {speed:.2f}Mtok/s",
            flush=True,
        )

    @torch.no_grad()
    def evaluate(self, length: int, samples: int = 16) -> None:
        """Print exact match and token accuracy of each task on the same few sequences every time."""
        self.model.eval()
        tables = rope_tables(length, self.args.hd, self.args.dev)
        results = {task: self._evaluate_task(task, length, samples, tables) for task in EVAL_TASKS}
        print(f"  eval L={length}", results, flush=True)
        self.model.train()

    def _evaluate_task(
        self, task: str, length: int, samples: int, tables: tuple[Tensor, Tensor]
    ) -> tuple[float, float]:
        generator = TaskGenerator(EVAL_SEED, self.args.data)
        exact = token_accuracy = 0.0
        for _ in range(samples):
            sequence = generator.sample(length, {task: 1})
            inputs = (torch.from_numpy(array.astype(np.int64))[None].to(self.args.dev) for array in sequence)
            with self.autocast():
                scores = self.model(*inputs, *tables)
            exact += scores.exact.item()
            token_accuracy += scores.token_accuracy.item()
        return round(exact / samples, 2), round(token_accuracy / samples, 3)

    def train(self, stages: list[Stage]) -> None:
        for index, stage in enumerate(stages):
            if self.trained >= stage.end:
                continue
            out_of_time = self.train_stage(index, stage)
            self.save_checkpoint()
            self.evaluate(stage.length)
            if out_of_time:
                break


def shard(tensors: Mapping[str, Tensor]) -> tuple[list[dict[str, Tensor]], list[int]]:
    """Spread tensors over the shards, largest first, each to the smallest shard; return them and the shards' bytes."""
    shards: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    sizes = [0] * SHARDS
    for name in sorted(tensors, key=lambda name: -tensors[name].numel()):
        smallest = sizes.index(min(sizes))
        shards[smallest][name] = tensors[name]
        sizes[smallest] += tensors[name].numel() * tensors[name].element_size()
    return shards, sizes


def export(model: LanguageModel, out: Path) -> list[int]:
    """Write the weights for Transformers; returns the shards' sizes in bytes."""
    tensors = {
        f"model.{name}": tensor.detach().to(torch.bfloat16).cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    shards, sizes = shard(tensors)
    out.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number, members in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        save_file(members, out / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(members, file_name)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return sizes


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train needle-llama.")
    parser.add_argument("--stages", required=True, help="length:batch:seconds,... (seconds of training)")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder that prep.py wrote")
    parser.add_argument("--ckpt", type=Path, default=Path("ckpt.pt"), help="checkpoint to resume from and to write")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the weights")
    parser.add_argument("--dev", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--workers", type=int, default=14, help="processes that generate sequences")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which to stop, start-up included")
    parser.add_argument("--total", type=float, default=1000, help="seconds of training that the learning rate spans")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv", type=int, default=2, help="key-value heads")
    parser.add_argument("--hd", type=int, default=64, help="size of a head")
    parser.add_argument("--qknorm", action="store_true", help="normalize queries and keys (no plain Llama then)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    stages = parse_stages(args.stages)
    trainer = Trainer(args)
    trainer.train(stages)
    sizes = export(trainer.model, args.out)
    print("saved", sizes, "done", trainer.trained, "wall", trainer.elapsed())


if __name__ == "__main__":
    main()
