"""GGUF: one file with a model's config, weights and tokenizer. Transformers loads it and makes its weights floats."""

from importlib.util import find_spec
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence

from sparse_patch.errors import SparsePatchError, one_line, reason

_PRE = "tokenizer.ggml.pre"
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")  # as in llama.cpp


def gguf_file(path: str | Path, option: str = "--model") -> Path | None:
    """The GGUF file that a path names: the file itself, or the one in a folder without config.json. None for others.

    Raises:
        SparsePatchError: the folder has several.
    """
    path = Path(path)
    if path.suffix == ".gguf" and path.is_file():
        return path
    files = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf")) if path.is_dir() else []
    if len(files) > 1:
        names = one_line(", ".join(file.name for file in files), 120)
        raise SparsePatchError(f"{option}: {one_line(path)}: has {len(files)} GGUF files; name one of them: {names}")
    return files[0] if files else None


def check_gguf(file: Path, option: str) -> None:
    """Raise if a file cannot be loaded as GGUF, as far as its first bytes say.

    Raises:
        SparsePatchError: the package `gguf` is not installed, or the file is none.
    """
    if find_spec("gguf") is None:
        raise SparsePatchError(
            f'{option}: {one_line(file)}: the package gguf is missing; pip install "sparse_patch[gguf]"'
        )
    try:
        with file.open("rb") as data:
            begins = data.read(4)
    except OSError as error:
        raise SparsePatchError(f"{option}: {one_line(file)}: cannot be read: {reason(error)}") from None
    if begins != b"GGUF":
        raise _damaged(file, option, "it does not begin with GGUF")


def splitting(file: Path, option: str) -> PreTokenizer | None:
    """How the tokenizer splits a text before it merges; None if what Transformers makes of the file is right.

    Transformers knows the rules of Llama 3, Qwen 2 and others. For the rest it takes GPT-2's, which keep numbers whole.

    Raises:
        SparsePatchError: the file is damaged.
    """
    from gguf import GGUFReader

    try:
        field = GGUFReader(file).get_field(_PRE)
    except Exception as error:  # of many types, for a damaged file
        raise _damaged(file, option, error) from error
    if field is None or field.contents() not in _SINGLE_DIGITS:
        return None
    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])


def _damaged(file: Path, option: str, why: object) -> SparsePatchError:
    return SparsePatchError(
        f"{option}: {one_line(file)}: cannot be read as GGUF: {one_line(why, 120)}; download it again"
    )
