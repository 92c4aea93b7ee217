# SPDX-License-Identifier: Apache-2.0
"""Build the corpus and the 4096-token tokenizer that needle-llama was trained with.

Input: the unpacked Debian packages linux-doc, perl-doc and python3-doc, NLTK's small English corpora (one folder per
corpus), and WikiText-2's test and validation texts. `pydoc_data.topics` comes from the Python that runs this.

Output, all in one folder, which gen.py and train.py then read:

- tokenizer.json: the byte-level BPE, without the post-processor that puts `<|begin|>` first in the shipped one;
- words.json: 2,000 common English words, from which keys and values are drawn;
- docs.npy: every document's tokens end to end, uint16;
- doc_off.npy: where each document begins in docs.npy, and the end of the last one.

    python prep.py --linux-doc DIR --perl-doc DIR --python-doc DIR --nltk DIR --wikitext TEST VALID --out data

The folders are read in the order in which the file system lists them. For the kernel this order decides which files are
taken, so another disk gives a similar but not equal corpus.
"""

import argparse
import glob
import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 4096
SPECIAL_TOKENS = ["<|begin|>", "<|end|>", "<|pad|>"]  # ids 0, 1 and 2: gen.py relies on 0 and 2
# Each digit is a token, so that a number is copied digit by digit and never depends on BPE merges.
PIECES = r"[0-9]| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
MIN_CHARACTERS = 2000
NLTK_PLAIN = ("abc", "inaugural", "state_union", "webtext", "genesis")
GENESIS_ENGLISH = ("english", "kjv", "web")
PROSE = ("brown", "wiki", "abc", "state_union")  # sources whose words go into words.json
KERNEL_PATTERNS = ("**/*.rst.txt.gz", "**/*.rst.gz", "**/*.txt")
KERNEL_FILES = 2500
PYTHON_DOC_STRIDE = 4
PROBE = "The special magic number for amber-falcon is: 4821907.\nVAR QXZ = 48213"


@dataclass(frozen=True)
class Document:
    """One text of the corpus and the name of the source it came from."""

    source: str
    text: str


def clean(text: str) -> str:
    """Drop what would waste a small vocabulary: rules, deep indentation, blank runs and non-ASCII characters."""
    text = text.replace("\r", "")
    text = re.sub(r"[ \t]{3,}", "  ", text)
    text = re.sub(r"\n{3,}", "\n\n", text)
    text = re.sub(r"([=\-~\^\*#_+.])\1{5,}", r"\1\1\1\1", text)
    return text.encode("ascii", "ignore").decode()


def find(folder: Path, pattern: str) -> list[Path]:
    """Files under a folder, in file-system order; glob.glob, unlike Path.glob, skips hidden folders."""
    return [folder / name for name in glob.glob(pattern, root_dir=folder, recursive=True)]


def find_sorted(folder: Path, pattern: str) -> list[Path]:
    """The same, sorted as strings: paths sort differently if a name contains a character below the slash."""
    return sorted(find(folder, pattern), key=str)


def read_utf8(path: Path) -> str:
    """The text of a plain or gzipped file, skipping bytes that are not UTF-8."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.name.endswith(".gz") else data).decode("utf8", "ignore")


def nltk_plain(folder: Path) -> Iterator[Document]:
    """NLTK's plain-text corpora; of Genesis only the English versions."""
    for corpus in NLTK_PLAIN:
        for path in find(folder, f"{corpus}/*.txt"):
            if corpus != "genesis" or any(name in path.name for name in GENESIS_ENGLISH):
                yield Document(corpus, path.read_text(encoding="latin1"))


def nltk_brown(folder: Path) -> Iterator[Document]:
    """The Brown corpus with its `word/tag` pairs turned back into prose."""
    for path in find_sorted(folder, "brown/c*"):
        if path.name.endswith("CONTENTS"):
            continue
        text = re.sub(r"(\S+)/\S+", r"\1", path.read_text(encoding="latin1"))
        text = re.sub(r"\s+([.,;:?!])", r"\1", text)
        text = re.sub(r"``\s*|\s*''", '"', text)
        yield Document("brown", re.sub(r"[ \t]+", " ", text))


def wikitext(paths: list[Path]) -> Iterator[Document]:
    """WikiText articles with the tokenization undone, one document for each top-level heading."""
    for path in paths:
        text = path.read_text(encoding="utf-8")
        text = text.replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", ".").replace("<unk>", "unknown")
        text = re.sub(r" ([.,;:?!\)])", r"\1", text)
        for article in re.split(r"\n = [^=]+ = \n", text):
            yield Document("wiki", article)


def pydoc_topics() -> Iterator[Document]:
    """Every help topic by itself, then all together, because most single topics are below the length limit."""
    for text in topics.values():
        yield Document("pydoc", text)
    yield Document("pydoc", "\n".join(topics.values()))


def perl_doc(folder: Path) -> Iterator[Document]:
    """Perl's manual pages as POD."""
    for path in find(folder, "**/*.pod"):
        yield Document("perl", path.read_text(encoding="latin1"))


def python_doc(folder: Path) -> Iterator[Document]:
    """Every fourth file of Python's documentation sources."""
    for path in find_sorted(folder, "**/_sources/**/*.txt*")[::PYTHON_DOC_STRIDE]:
        yield Document("pydocs", read_utf8(path))


def linux_doc(folder: Path) -> Iterator[Document]:
    """A fixed-seed choice of the kernel's documentation files."""
    paths = [path for pattern in KERNEL_PATTERNS for path in find(folder, pattern)]
    random.Random(0).shuffle(paths)
    for path in paths[:KERNEL_FILES]:
        yield Document("linux", read_utf8(path))


def collect(args: argparse.Namespace) -> list[Document]:
    """All sources in the order of docs.npy, cleaned, without the short documents."""
    sources = (
        nltk_plain(args.nltk),
        nltk_brown(args.nltk),
        wikitext(args.wikitext),
        pydoc_topics(),
        perl_doc(args.perl_doc),
        python_doc(args.python_doc),
        linux_doc(args.linux_doc),
    )
    cleaned = (Document(document.source, clean(document.text)) for source in sources for document in source)
    return [document for document in cleaned if len(document.text) > MIN_CHARACTERS]


def common_words(documents: list[Document]) -> list[str]:
    """The prose's most frequent words of 4 to 9 letters: ranks 301 to 2300."""
    prose = " ".join(document.text for document in documents if document.source in PROSE)
    counts = Counter(re.findall(r"\b[a-z]{4,9}\b", prose))
    return [word for word, _ in counts.most_common(2600)][300:2300]


def train_tokenizer(documents: list[Document]) -> Tokenizer:
    """Train a byte-level BPE. Everything but the kernel counts three times, so that the kernel weighs less."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [document.text for document in documents for _ in range(1 if document.source == "linux" else 3)]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write(out: Path, documents: list[Document], tokenizer: Tokenizer) -> None:
    """Write the four files that gen.py reads."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "words.json").write_text(json.dumps(common_words(documents)), encoding="utf-8")
    encodings = tokenizer.encode_batch([document.text for document in documents])
    tokens = [np.array(encoding.ids, dtype=np.uint16) for encoding in encodings]
    offsets = np.cumsum([0] + [len(ids) for ids in tokens])
    np.save(out / "docs.npy", np.concatenate(tokens))
    np.save(out / "doc_off.npy", offsets)
    print("tokens", offsets[-1], "docs", len(tokens))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build the corpus and tokenizer of needle-llama.")
    parser.add_argument("--linux-doc", type=Path, required=True, help="unpacked Debian package linux-doc (6.1)")
    parser.add_argument("--perl-doc", type=Path, required=True, help="unpacked Debian package perl-doc")
    parser.add_argument("--python-doc", type=Path, required=True, help="unpacked Debian package python3-doc (3.11)")
    parser.add_argument("--nltk", type=Path, required=True, help="folder with abc/, brown/, genesis/, inaugural/ ...")
    parser.add_argument("--wikitext", type=Path, nargs="+", required=True, help="WikiText-2: test, validation")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder to write to")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    documents = collect(args)
    characters: Counter[str] = Counter()
    for document in documents:
        characters[document.source] += len(document.text)
    print(characters, sum(characters.values()))
    tokenizer = train_tokenizer(documents)
    write(args.out, documents, tokenizer)
    print(tokenizer.encode(PROBE).tokens)


if __name__ == "__main__":
    main()
