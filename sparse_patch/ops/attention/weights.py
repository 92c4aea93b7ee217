"""The softmax of the PyTorch backends."""

import torch

HIDDEN = torch.finfo(torch.float32).min  # the logit of a key that is not seen; finite, because a query may see no key


def weights_of(scores: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
    """The softmax of float32 scores `[..., T]`. Scores where `hidden` broadcasts to true become `HIDDEN`, in place.

    A query that sees no key gets weights without a meaning.
    """
    return (scores if hidden is None else scores.masked_fill_(hidden, HIDDEN)).softmax(-1)


def lse_of(scores: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The log-sum-exp of scores `[..., T]`, from their softmax: `-inf` for a query that sees no key."""
    largest = scores.amax(-1)
    return (largest - weights.amax(-1).log()).masked_fill_(largest == HIDDEN, -torch.inf)
