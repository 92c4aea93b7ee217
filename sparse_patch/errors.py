"""The exceptions of this package. Every message is one line that names what is wrong and the way out."""


class SparsePatchError(Exception):
    """Base of everything this package raises on purpose."""


class ConfigError(SparsePatchError, ValueError):
    """A configuration is not valid: names the file, the path of the field, what was expected and the nearest key."""


class PatchError(SparsePatchError, RuntimeError):
    """A model cannot be patched or unpatched; it was left as it was."""


class UnsupportedCallError(SparsePatchError, RuntimeError):
    """A sparse method cannot serve this attention call and the configuration says `on_unsupported: error`."""


class TaskError(SparsePatchError, ValueError):
    """An evaluation cannot be made or run: a task, length, haystack or model that does not fit."""
