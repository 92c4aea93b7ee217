"""Tiny tokenizers of the usual types, trained here on Python's help topics."""

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sparse_patch.workbench.prompts import default_haystack

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@cache
def byte_fallback_bpe() -> Any:
    """Like Llama 2's: spaces are part of words, and unknown characters become their UTF-8 bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=["<s>", "</s>", "<unk>", *BYTES], show_progress=False)
    return _trained(tokenizer, trainer)


@cache
def unigram() -> Any:
    """Like those of T5 and Gemma: the most probable split, without a special token in front."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=1000, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    return _trained(tokenizer, trainer, bos=False)


def _trained(tokenizer: Tokenizer, trainer: Any, bos: bool = True) -> Any:
    lines = default_haystack()[:150_000].split("\n")
    tokenizer.train_from_iterator([*lines, *"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-"], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
