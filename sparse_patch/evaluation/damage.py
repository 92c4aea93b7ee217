"""Damage: how far a configuration's predictions are from those of dense attention, token by token.

It shows long before an answer is lost: the most probable token can stay the same while its probability falls.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sparse_patch.call import Phase
from sparse_patch.config import PatchConfig
from sparse_patch.integration.patching import patched
from sparse_patch.integration.reporting import sparsity_report
from sparse_patch.methods.dense import DenseMethod
from sparse_patch.report import SparsityReport
from sparse_patch.workbench.generation import force, prefill


@dataclass(frozen=True)
class Damage:
    """The predictions of one configuration compared with those of dense attention, on the tokens of one prompt.

    Attributes:
        kl: KL(dense || configuration) in nats, mean over tokens.
        same: number of tokens whose most probable prediction is that of dense attention.
        loss: cross-entropy of the true tokens in nats, mean over tokens.
        dense_loss: the same of dense attention.
    """

    kl: float
    same: int
    loss: float
    dense_loss: float


@dataclass(frozen=True)
class Predictions:
    """What a model predicted at each token of a known continuation.

    Attributes:
        log_probs: float32, `[tokens, vocabulary]`.
        report: what was computed.
        prefill_s, decode_s: seconds.
    """

    log_probs: torch.Tensor
    report: SparsityReport
    prefill_s: float
    decode_s: float

    @property
    def tokens(self) -> list[int]:
        """The most probable tokens."""
        return self.log_probs.argmax(-1).tolist()


def predict(model: PreTrainedModel, tokens: Sequence[int], answer: Sequence[int], config: PatchConfig) -> Predictions:
    """Predict each token of an answer after the right tokens before it.

    The answer is fed token by token, as generation would. But if only prefill is sparse, its decode steps would be
    dense, so the answer is read with the prompt, in one forward.
    """
    with patched(model, config):
        if _is_sparse(config, "prefill") and not _is_sparse(config, "decode"):
            start = prefill(model, [*tokens, *answer[:-1]], answer=1, keep=len(answer))
            logits, decode_s = start.logits, 0.0
        else:
            start = prefill(model, tokens, answer=len(answer))
            forced = force(model, start, answer, keep=True)
            assert forced.logits is not None
            logits, decode_s = forced.logits, forced.seconds
        report = sparsity_report(model)
    return Predictions(torch.log_softmax(logits.float(), -1), report, start.seconds, decode_s)


def damage(dense: torch.Tensor, ours: torch.Tensor, answer: Sequence[int]) -> Damage:
    """Compare predictions with those of dense attention.

    Args:
        dense, ours: log-probabilities, float32 `[tokens, vocabulary]`.
        answer: the true tokens.
    """
    true = torch.tensor(answer, device=ours.device)
    kl = torch.nn.functional.kl_div(ours.double(), dense.double(), reduction="none", log_target=True).sum(-1).mean()
    return Damage(
        kl=max(0.0, float(kl)),  # rounding can make it negative
        same=int((dense.argmax(-1) == ours.argmax(-1)).sum()),
        loss=float(torch.nn.functional.nll_loss(ours, true)),
        dense_loss=float(torch.nn.functional.nll_loss(dense, true)),
    )


def _is_sparse(config: PatchConfig, phase: Phase) -> bool:
    return not isinstance(config.method(phase), DenseMethod | None)
