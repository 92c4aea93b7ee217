"""Checkpoints that have a loader here, because Transformers would run the code that comes with them. A row each."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedConfig, PreTrainedModel

from sparse_patch.models.minicpm import MODEL_TYPE, is_minicpm, load_minicpm, minicpm_config


class Loader(NamedTuple):
    """How the checkpoints of one family are loaded.

    Attributes:
        model_type: what their config.json says.
        name: the loader's public name in `sparse_patch`, for messages.
        handles: whether a folder or hub id is of the family.
        config: makes the native config of a checkpoint.
        load: loads a checkpoint as a native model, in a `dtype`.
    """

    model_type: str
    name: str
    handles: Callable[[str | Path], bool]
    config: Callable[[str | Path], PreTrainedConfig]
    load: Callable[..., PreTrainedModel]


LOADERS = (Loader(MODEL_TYPE, "load_minicpm", is_minicpm, minicpm_config, load_minicpm),)


def loader_of(path: str | Path) -> Loader | None:
    """The loader of a folder or hub id; None for what Transformers loads itself."""
    return next((loader for loader in LOADERS if loader.handles(path)), None)
