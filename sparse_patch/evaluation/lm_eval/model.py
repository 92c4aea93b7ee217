"""The model `hf-sparse`; importing this module registers it with lm-eval."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator, normalize_gen_kwargs
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel

from sparse_patch.config import ConfigSource, PatchConfig, load_config
from sparse_patch.errors import ConfigError, TaskError, short
from sparse_patch.evaluation.lm_eval.hidden_states import HiddenStates
from sparse_patch.integration.patch import is_patched
from sparse_patch.integration.patching import patch_model
from sparse_patch.integration.reporting import sparsity_report, uncounted
from sparse_patch.models.loading import check_config, loading
from sparse_patch.report import SparsityReport, merged

_LOGITS_BYTES = 256 * 2**20  # of logits held at once, at most
_TOO_LONG = "pass truncation=True to cut prompts from the left, or ask for shorter ones"
Tokens = tuple[tuple[str, str], list[int], list[int]]  # lm-eval's request: texts, context, continuation


@register_model("hf-sparse")
class SparseLM(HFLM):
    """lm-eval's Transformers model with sparse attention, and with prompts as long as the model accepts.

    It differs from `hf` in these points:

    - The model is patched. The results contain the configuration, its hash, what was computed, and the versions.
    - Batches of loglikelihood requests are left-padded, with a mask. `hf` right-pads them without a mask, so the last
      queries, from which sparse methods choose, are padding.
    - Logits are computed only for the tokens that are scored, a slice at a time.
    - A prompt that is too long for the model raises before anything runs. With `truncation=True` it is cut and counted
      instead.
    - A request that cannot be answered at all (no room for a prompt, nothing to score) raises too; the message says
      what to change.
    - Continuations that share a row are each scored at their own positions. `hf` scores a shorter one at the row's
      first positions.
    - The trial runs of `batch_size=auto` do not count in the report.
    - Data parallelism under `accelerate launch` also works on CPUs.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        config: ConfigSource | Sequence[ConfigSource] | PatchConfig | None = None,
        *,
        device: str | None = None,
        truncation: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            pretrained: a hub id, a folder or a model. A patched model keeps its patch.
            config: as for `patch_model`. In `--model_args`, join several configurations with `+`.
            device: device of the model; by default a GPU if there is one.
            truncation: cut prompts that are too long, instead of raising.
            **kwargs: all other arguments of lm-eval's `hf`.

        Raises:
            ConfigError: the configuration is missing or not valid, or the model is already patched with another one.
        """
        patch_of_its_own = not isinstance(pretrained, str) and is_patched(pretrained)
        if patch_of_its_own == (config is not None):
            raise ConfigError(
                "hf-sparse: config: the model is patched already; leave it out, or unpatch_model first"
                if patch_of_its_own
                else "hf-sparse: config: missing; add config=flexprefill.yaml, or config=dense.yaml for a baseline"
            )
        settings = _settings(config)  # raises before a large model is loaded
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if isinstance(pretrained, str):
            check_config("hf-sparse: pretrained", pretrained)
        with loading("hf-sparse: pretrained", pretrained if isinstance(pretrained, str) else "a model"):
            super().__init__(pretrained, device=device, truncation=False, **kwargs)
        if getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False):
            raise ConfigError("hf-sparse: peft: prompt tuning adds tokens of its own, which is not supported; use hf")
        self._cut = truncation
        self._cut_here = 0
        self._of_all_ranks: tuple[SparsityReport, int] | None = None
        if settings is not None:
            patch_model(self.model, settings)
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and self.world_size == 1:  # lm-eval sets these only if it sees several GPUs
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        for request in requests:
            context, continuation = request.args
            if not context and not self.tok_encode(continuation, add_special_tokens=False):
                raise _refused("a request", "has neither a context nor a continuation; leave it out")
        with self._report_of_all_ranks():
            return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        with self._report_of_all_ranks():
            return super().loglikelihood_rolling(requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        for request, tokens in zip(requests, lengths, strict=True):
            name = request.task_name or "a request"
            if not tokens:
                raise _refused(name, "a prompt is empty, and the tokenizer puts no token in front; give it a text")
            room = self._room(request.args[1], name, max(lengths))
            self._check_length(tokens, room, name, f"{_TOO_LONG} or fewer new tokens")
        with self._report_of_all_ranks():
            return super().generate_until(requests, disable_tqdm)

    def _room(self, settings: dict[str, Any], name: str, longest: int) -> int:
        """The most tokens that a prompt may have in addition to the new tokens that a request asks for.

        Args:
            settings: generation settings of the request.
            name: name of the task, for messages.
            longest: tokens of the longest prompt of all requests.

        Raises:
            TaskError: nothing can be generated with these settings.
        """
        try:
            asked: int = normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
        except (ValueError, TypeError) as error:
            raise _refused(name, f"generation_kwargs: {error}") from None
        until = settings.get("until", [])
        if not all(isinstance(text, str) for text in (until if isinstance(until, list) else [until])):
            raise _refused(name, f"until: expected texts, got {short(until)}; leave it out for none")
        if asked < 1:
            raise _refused(name, f"asks for {asked} new tokens; ask for 1 or more: --gen_kwargs max_gen_toks=1")
        if asked >= self.max_length:
            raise _refused(name, self._no_room(asked, longest))
        whole, read = settings.get("max_length"), min(longest, self.max_length - asked)
        if whole is not None and read >= whole:
            raise _refused(
                name, f"max_length of {whole} leaves no room after a prompt of {read} tokens; give max_gen_toks instead"
            )
        return self.max_length - asked

    def _no_room(self, asked: int, longest: int) -> str:
        """The message that `asked` new tokens leave no room for a prompt, with the number that would."""
        context = self.max_length
        if context < 2:
            return f"a context of {context} has no room for a prompt and a new token; raise max_length"
        way_out = f"--gen_kwargs max_gen_toks={context - longest if longest < context else context // 2}"
        if longest >= context:
            way_out += f", and pass truncation=True, for the longest prompt has {longest} tokens"
        return (
            f"asks for {asked} new tokens, which leave no room for a prompt in the model's context of {context}; "
            f"ask for fewer: {way_out}"
        )

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval's own info, plus what ran under the key `sparse_patch`; lm-eval puts it into the results."""
        report, cut = self._of_all_ranks or (sparsity_report(self.model), self._cut_here)
        return {
            **super().get_model_info(),
            "sparse_patch": {
                "config": report.config,
                "source": report.source,
                "config_hash": report.fingerprint,
                "density": report.density("prefill"),
                "attended": report.attended("decode"),
                "fallbacks": report.fallbacks(),
                "truncated_prompts": cut,
                "hook_active": report.hook_active,
                "versions": report.versions,
            },
        }

    def _loglikelihood_tokens(
        self, requests: list[Tokens], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        for texts, context, continuation in requests:
            name = f"the request {short(texts[0])}" if texts else "a window"
            for part, tokens in (("context", context), ("continuation", continuation)):
                if not tokens:
                    raise _refused(name, f"its {part} has no tokens; give it a text, or leave the request out")
            if len(continuation) > self.max_length:
                raise _refused(
                    name,
                    f"its continuation of {len(continuation)} tokens is longer than the model's context of "
                    f"{self.max_length}; shorten it, or raise max_length if the model takes more",
                )
            self._check_length(len(context) + len(continuation), self.max_length + 1, name, _TOO_LONG)
        ordered = Collator(
            requests,
            sort_fn=lambda request: (-len(request[1]) - len(request[2]), (*request[1], *request[2])),
            group_by="contexts" if self.logits_cache else None,
            group_fn=lambda request: request[1] + request[2][:-1],
        )
        automatic = self.batch_size == "auto" and not override_bs
        if automatic:
            self.batch_sizes: dict[int, int] = {}
        chunks = ordered.get_batched(
            n=0 if automatic else override_bs or self.batch_size,
            batch_fn=self._batch_scheduler if automatic else None,
        )
        results: list[tuple[float, bool]] = []
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="loglikelihood") as bar:
            for chunk in chunks:
                answers = list(self._score(ordered, chunk))
                results += answers
                bar.update(len(answers))
        return ordered.get_original(results)

    def _score(self, ordered: Collator, chunk: Sequence[Tokens]) -> Iterator[tuple[float, bool]]:
        """Yield the log-probability of each continuation, and whether it is the greedy one."""
        rows = [(context + continuation)[-(self.max_length + 1) : -1] for _, context, continuation in chunk]
        read = self._read(rows)
        for number, (texts, context, continuation) in enumerate(chunk):
            # One row may serve several requests: the same tokens, cut differently into context and continuation.
            shared = ordered.get_cache(
                req_str=texts, cxt_toks=context, cont_toks=continuation, logits=torch.empty(1, 0, 0)
            )
            for request, tokens, _ in shared:
                answer = self._log_probability(read, number, tokens)
                if request is not None:
                    self.cache_hook.add_partial("loglikelihood", request, answer)
                yield answer

    @torch.no_grad()
    def _read(self, rows: Sequence[Sequence[int]]) -> "HiddenStates":
        length = max(len(row) for row in rows)
        padding = self.tokenizer.pad_token_id
        ids = torch.tensor([[padding] * (length - len(row)) + list(row) for row in rows], device=self.device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=self.device)
        with self._autocast():
            return HiddenStates(self.model, ids, mask)

    @torch.no_grad()
    def _log_probability(self, read: "HiddenStates", row: int, tokens: Sequence[int]) -> tuple[float, bool]:
        """Log-probability of a row's last tokens, and whether they are the greedy ones; computed slice by slice."""
        step = max(1, _LOGITS_BYTES // (4 * self.model.config.get_text_config().vocab_size))
        total, greedy = 0.0, True
        for begin in range(0, len(tokens), step):
            expected = torch.tensor(tokens[begin : begin + step], device=self.device)
            first = read.length - len(tokens) + begin
            with self._autocast():
                logits = read.logits(slice(row, row + 1), slice(first, first + len(expected)))[0]
            probabilities = functional.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
            total += float(probabilities.gather(-1, expected[:, None]).sum())
            greedy = greedy and bool((probabilities.argmax(-1) == expected).all())
        return total, greedy

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        """For lm-eval's trials of batch sizes: use the memory of a request, without a whole prompt's logits."""
        with torch.no_grad(), self._autocast():
            return HiddenStates(self.model, inps, torch.ones_like(inps)).logits(slice(None), slice(-1, None))

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        with uncounted(self.model):
            return super()._detect_batch_size(requests, pos)

    def _check_length(self, tokens: int, room: int, name: str, way_out: str) -> None:
        if tokens <= room:
            return
        if not self._cut:
            raise _refused(
                name, f"{tokens} tokens do not fit, the model's context of {self.max_length} leaves {room}; {way_out}"
            )
        self._cut_here += 1

    def _autocast(self) -> torch.autocast:
        dtype = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None)

    @contextmanager
    def _report_of_all_ranks(self) -> Iterator[None]:
        """Gather the ranks' reports after the requests, because lm-eval asks for them only on the first rank."""
        yield
        if self.world_size > 1:
            parts = self.gather_object((sparsity_report(self.model), self._cut_here))
            if self.rank == 0:
                reports, cut = zip(*parts, strict=True)
                self._of_all_ranks = merged(reports), sum(cut)


def _settings(config: ConfigSource | Sequence[ConfigSource] | PatchConfig | None) -> PatchConfig | None:
    if config is None or isinstance(config, PatchConfig):
        return config
    return load_config(config.split("+") if isinstance(config, str) else config)


def _refused(name: str, problem: str) -> TaskError:
    return TaskError(f"hf-sparse: {name}: {problem}")
