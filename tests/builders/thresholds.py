"""Files of calibrations."""

from pathlib import Path
from typing import Any

import torch
from method_table import SMALL_MODEL

from sparse_patch.artefacts.base import Header
from sparse_patch.artefacts.thresholds import write_thresholds
from sparse_patch.model_shape import ModelShape


def sale_calibration(
    folder: Path, tau: torch.Tensor | None = None, shape: ModelShape = SMALL_MODEL, **changes: Any
) -> Path:
    """A file of SALE's thresholds, random if none are given."""
    settings = {"numerics": "int8", "window": 32, "block_size": 64, "error": 0.4, **changes}
    path = folder / "sale.safetensors"
    if tau is None:
        tau = torch.rand(shape.num_layers, shape.num_heads)
    write_thresholds(path, tau, Header.of("sale", shape, settings))
    return path
