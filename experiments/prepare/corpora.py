"""text8, LM1B and OpenWebText, and any text in the alphabet of text8."""

import collections
import json
import pathlib
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator

from mdm_jax.data.records import StreamedTexts, read_text

TEXT8_CHARACTERS = 100_000_000
OPENWEBTEXT_HELD_OUT = 100_000
"""Last documents, as in MDLM (Sahoo et al. 2024, section 5.1)."""

_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DIGIT, _OTHERS = re.compile("[0-9]"), re.compile("[^a-z]+")


def to_letters(text: str) -> str:
    """Lower-case ``text``, spell its digits, make one space of any run of characters but a to z.

    The last steps of the script that made text8 from Wikipedia (Mahoney 2006, "About the test
    data"), whose first ones remove markup. There are 27 characters left.
    """
    spelt = _DIGIT.sub(lambda match: f" {_NAMES[int(match[0])]} ", text.lower())
    return _OTHERS.sub(" ", spelt)


def text8(source: pathlib.Path) -> str:
    """text8 from its zip archive or the file in it; ValueError for any other text.

    Its first 90 million characters are for training, then 5 million each for valid and test.
    """
    _need(source, "text8.zip (31 MB, http://mattmahoney.net/dc/text8.zip)")
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            text = archive.read("text8").decode("ascii")
    else:
        text = source.read_text("ascii")
    if len(text) != TEXT8_CHARACTERS or re.search("[^a-z ]", text):
        raise ValueError(
            f"{source}: text8 has {TEXT8_CHARACTERS:,} characters from a to z and space, this file "
            f"has {len(text):,}; for other texts use: python -m experiments.prepare letters"
        )
    return text


def letters(sources: Iterable[pathlib.Path], text_field: str = "text") -> tuple[str, int]:
    """Texts and JSON-lines files in the alphabet of text8, one after another, and how many."""
    texts: list[str] = []
    for source in sources:
        _need(source, "a text, or JSON lines with a text each")
        if ".jsonl" in source.suffixes:
            texts += StreamedTexts(str(source), text_field)
        else:
            texts.append(read_text(source).content)
    return to_letters(" ".join(texts)).strip(), len(texts)


def lm1b(source: pathlib.Path) -> Iterator[tuple[str, str]]:
    """(split, sentence) of LM1B's unpacked archive: its training shards for training, the first
    held-out shard for valid and the other 49 for test. Sentences stay tokenised as they are."""
    what = (
        "the unpacked folder of 1-billion-word-language-modeling-benchmark-r13output.tar.gz "
        "(1.7 GB, https://www.statmt.org/lm-benchmark/)"
    )
    _need(source, what)
    for folder, splits in (
        ("training-monolingual.tokenized.shuffled", ("train", "train")),
        ("heldout-monolingual.tokenized.shuffled", ("valid", "test")),
    ):
        shards = sorted((source / folder).glob("news.en*-of-*"))
        if not shards:
            raise ValueError(f"{source / folder}: no files news.en*-of-*; give {what}")
        for number, shard in enumerate(shards):
            with shard.open(encoding="utf-8") as lines:
                for line in lines:
                    if sentence := line.rstrip("\n"):
                        yield splits[number > 0], sentence


def openwebtext(
    source: pathlib.Path, held_out: int = OPENWEBTEXT_HELD_OUT
) -> Iterator[tuple[str, str]]:
    """(split, document) of a folder with OpenWebText, the last ``held_out`` documents for valid.

    The folder holds the .xz archives of text files of the first release (sorted by name), or JSON
    lines or Parquet with a field "text".
    """
    what = "a folder with OpenWebText's *.xz archives (https://skylion007.github.io), *.jsonl or "
    what += "*.parquet"
    _need(source, what)
    last: collections.deque[str] = collections.deque()
    for document in _documents(source, what):
        last.append(document)
        if len(last) > held_out:
            yield "train", last.popleft()
    for document in last:
        yield "valid", document


def _documents(source: pathlib.Path, what: str) -> Iterator[str]:
    archives = sorted(p for p in source.glob("*.xz") if ".jsonl" not in p.suffixes)
    for path in archives:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile():
                    yield archive.extractfile(member).read().decode("utf-8")
    if archives:
        return
    try:
        yield from StreamedTexts(str(source), "text")
    except ValueError as error:
        raise ValueError(f"{error}; give {what}") from error


def write_documents(documents: Iterable[tuple[str, str]], folder: pathlib.Path) -> dict[str, int]:
    """Write train.jsonl, valid.jsonl, ... of (split, text); returns documents by split.

    Files are renamed when all is written; ValueError if one exists.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts: collections.Counter[str] = collections.Counter()
    files = {}
    try:
        for split, text in documents:
            if split not in files:
                refuse_existing(folder / f"{split}.jsonl")
                files[split] = (folder / f"{split}.jsonl.partial").open("w", encoding="utf-8")
            files[split].write(json.dumps({"text": text}) + "\n")
            counts[split] += 1
    finally:
        for file in files.values():
            file.close()
    for split in files:
        (folder / f"{split}.jsonl.partial").rename(folder / f"{split}.jsonl")
    return dict(counts)


def refuse_existing(path: pathlib.Path) -> None:
    if path.exists():
        raise ValueError(f"{path}: exists; remove it, or choose another --to")


def _need(source: pathlib.Path, what: str) -> None:
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder; download {what} and give its path")
