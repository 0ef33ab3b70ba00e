"""Records of JSON-lines and Parquet files: which files, their fields, and rows that are bad."""

import collections
import contextlib
import dataclasses
import difflib
import glob
import gzip
import json
import lzma
import math
import os
import re
import string
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from mdm_jax import files
from mdm_jax.checks import missing_package
from mdm_jax.data.datasets import SPLITS, shuffled_split
from mdm_jax.data.tokenizers import utf8

BadRows = Annotated[
    Literal["error", "drop"],
    "rows that are no JSON or lack a field: refused, or dropped and counted",
]
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet")
"""Files of a directory that are read."""
_SHOWN = 5  # bad rows whose reasons are kept


class Text(NamedTuple):
    """Contents of a text file, and what was dropped, for ``Dataset.report``."""

    content: str
    dropped: dict[str, int]


class Line(NamedTuple):
    """A line of a text file without its end, and its ``file:line`` for messages."""

    text: str
    origin: str


_SUFFIXES = {".gz": (gzip.open, b"\x1f\x8b"), ".xz": (lzma.open, b"\xfd7zXZ")}
"""How compressed files are opened, and what they begin with."""


def read_text(path: str | os.PathLike) -> Text:
    """A UTF-8 text file, .gz and .xz decompressed, without the byte order mark at its beginning.

    ValueError names the file if it is empty or not compressed as its suffix says; and the line and
    byte offset of bytes that are not UTF-8.
    """
    path = files.Path(path)
    decompress, _ = _SUFFIXES.get(path.suffix.lower(), (contextlib.nullcontext, b""))
    try:
        with path.open("rb") as raw, decompress(raw) as file:
            data = file.read()
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path}: damaged, or not a {path.suffix} file ({error})") from error
    try:
        content = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        suffixes = [suffix for suffix, (_, magic) in _SUFFIXES.items() if data.startswith(magic)]
        remedy = f"name it *{suffixes[0]}" if suffixes else "convert the file to UTF-8 first"
        raise ValueError(
            f"{path}:{line}: not UTF-8, byte 0x{data[error.start]:02x} at offset {error.start} "
            f"({error.reason}); {remedy}"
        ) from error
    text = content.removeprefix("\ufeff")
    if not text:
        raise ValueError(f"{path}: the file is empty")
    return Text(text, {"byte_order_marks": len(content) - len(text)})


def read_lines(path: str | os.PathLike) -> tuple[list[Line], dict[str, int]]:
    """The lines of :func:`read_text`, and counts of what was dropped.

    Lines end at ``\\n`` alone, not where ``str.splitlines`` cuts too, such as at U+2028 or a form
    feed; a ``\\r`` just before it is dropped and counted, and so are blank lines at the end.
    ValueError names file and line of a blank line before.
    """
    lines, dropped = _lines(path)
    for line in lines:
        _check_not_blank(line)
    return lines, dropped


def _lines(path: str | os.PathLike) -> tuple[list["Line"], dict[str, int]]:
    """As :func:`read_lines`, with blank lines between others."""
    text, dropped = read_text(path)
    lines = numbered(text, str(path))
    while lines and not lines[-1].text.strip(_BLANK):
        lines.pop()
    if not lines:
        raise ValueError(f"{path}: the file is empty")
    returns = sum(line.text.endswith("\r") for line in lines)
    lines = [line._replace(text=line.text.removesuffix("\r")) for line in lines]
    return lines, dropped | {"carriage_returns": returns}


def _check_not_blank(line: "Line") -> None:
    if not line.text.strip(_BLANK):
        raise ValueError(
            f"{line.origin}: empty line; only the end of the file may have empty lines"
        )


_BLANK = " \t\r"


def numbered(text: str, origin: str) -> list[Line]:
    """The lines of a text, which end at ``\\n`` alone."""
    pieces = text.split("\n")
    return [Line(piece, f"{origin}:{number}") for number, piece in enumerate(pieces, start=1)]


class Record(NamedTuple):
    """What a reader took from one row of a file, and its ``file:line`` for error messages.

    Splits go by the first of ``values``, a string.
    """

    values: tuple[Any, ...]
    origin: str


class Sources(NamedTuple):
    """Records by split; those for training by source.

    Attributes:
        train: records of each source; ``valid`` and ``test`` are those of all.
        paths, weights: of the sources as given; None without weights.
        report: counts of what was dropped.
        bad: file, line and reason of the first bad rows that were dropped.
    """

    train: list[list[Record]]
    valid: list[Record]
    test: list[Record]
    paths: list[str]
    weights: list[float] | None
    report: dict[str, int]
    bad: list[str]

    def splits(self) -> dict[str, list[Record]]:
        """Records by split, those of all sources in a row."""
        train = [record for records in self.train for record in records]
        return {"train": train, "valid": self.valid, "test": self.test}

    def describe(self, rows: Sequence[int]) -> str:
        """For the policy of a description: the mixture, with the rows of each, and bad rows."""
        text = ""
        if len(self.paths) > 1:
            weights = self.weights or rows
            shares = (weight / max(sum(weights), 1e-30) for weight in weights)
            mixed = zip(self.paths, shares, rows)
            text += " Mixed: " + ", ".join(f"{p} {s:.1%} ({n} rows)" for p, s, n in mixed) + "."
        if self.bad:
            count = self.report["bad_rows"]
            text += f"\n{count} bad rows were dropped, the first: " + "; ".join(self.bad) + "."
        return text


Reader = Callable[[Mapping[str, Any], str], tuple[Any, ...]]
"""``reader(object, origin) -> values`` of one row; ValueError, naming ``origin``, for a bad one."""


def read_sources(
    path: str | os.PathLike | Sequence[str],
    reader: Reader,
    *,
    wanted: str,
    named_by: str,
    valid_path: str | os.PathLike | None = None,
    test_path: str | os.PathLike | None = None,
    fractions: Sequence[float] = (1, 0, 0),
    split_seed: int = 0,
    bad_rows: BadRows = "error",
) -> Sources:
    """Records of each split, in the order of the files, from rows that are JSON objects.

    Without ``valid_path`` the *distinct first values* of each source are shuffled with
    ``split_seed`` and split by ``fractions``; one that an earlier source has goes into the split
    that it has there. So none is in two splits, and a further source leaves the splits of the
    others as they are. With it, all of ``path`` is for training, and
    ``test_path``, or nothing, is the test split.

    Args:
        path, valid_path, test_path: as :func:`weighted_paths`, each as :func:`find_files`.
        wanted: what a row holds, for the error about one that is no object.
        named_by: settings that say so, for the error about the first row.
        bad_rows: of rows that are no JSON, lack a field, ...: "error", or "drop" and count them.

    ValueError names file and line of a bad row under "error"; the file, if it is empty or a split
    would be.
    """
    if test_path is not None and valid_path is None:
        raise ValueError("test_path needs valid_path; without both, the one file is split")
    report: collections.Counter[str] = collections.Counter()
    bad: list[str] = []

    def records(path: str) -> list[Record]:
        found, before = [], report["bad_rows"]
        for name in find_files(path):
            for value, origin in _objects(name, wanted, report):
                try:
                    if isinstance(value, ValueError):
                        raise value
                    found.append(Record(reader(value, origin), origin))
                except ValueError as error:
                    if bad_rows == "error":
                        remedy = "mend the row, or choose bad_rows='drop', which counts such"
                        if not found and value is not error:  # the setting, rather than the row
                            remedy = f"say what to read by {named_by}"
                        raise ValueError(f"{error}; {remedy}") from error
                    report["bad_rows"] += 1
                    if len(bad) < _SHOWN:
                        bad.append(str(error))
        if not found:
            count = report["bad_rows"] - before
            raise ValueError(f"{path}: all {count} rows are bad, the first: {(bad or [''])[0]}")
        return found

    paths, weights = weighted_paths(path)
    every = [records(each) for each in paths]
    if valid_path is not None:
        held_out = [
            [record for each in weighted_paths(path or ())[0] for record in records(each)]
            for path in (valid_path, test_path)
        ]
        return Sources(every, *held_out, paths, weights, dict(report), bad)
    parts: dict[str, list[list[Record]]] = {name: [] for name in SPLITS}
    split_of: dict[str, str] = {}
    for each, found in zip(paths, every):
        distinct = list(dict.fromkeys(record.values[0] for record in found))
        items = f"distinct prompts in {len(found)} rows; no prompt is in two splits"
        numbers = shuffled_split(len(distinct), fractions, split_seed, each, items)
        own = {distinct[i]: name for name, chosen in numbers.items() for i in chosen}
        split_of = own | split_of
        for name in SPLITS:
            parts[name].append([r for r in found if split_of[r.values[0]] == name])
        if not parts["train"][-1]:
            raise ValueError(
                f"{each}: nothing is left for training, as earlier sources hold out all that it "
                "has; leave it out, or give valid_path"
            )
    valid, test = ([r for records in parts[name] for r in records] for name in ("valid", "test"))
    return Sources(parts["train"], valid, test, paths, weights, dict(report), bad)


def weighted_paths(
    path: str | os.PathLike | Sequence[str],
) -> tuple[list[str], list[float] | None]:
    """Paths of a mixture, and their weights: ``"a.jsonl:0.7,b.jsonl:0.3"``, or several such texts.

    Without weights None, with which sources count by their rows. ValueError if some have one and
    others not, or one is not positive.
    """
    texts = [path] if isinstance(path, str | os.PathLike) else list(path)
    pieces = []
    for text in map(os.fspath, texts):
        whole = "," not in text or files.Path(text).exists()
        pieces += [text] if whole else [piece.strip() for piece in text.split(",")]
    found: list[tuple[str, float | None]] = []
    for piece in pieces:
        name, _, number = piece.rpartition(":")
        weight = None
        if name and not files.Path(piece).exists():
            with contextlib.suppress(ValueError):
                weight = float(number)
        found.append((piece, None) if weight is None else (name, weight))
    weights = [weight for _, weight in found if weight is not None]
    if any(not piece for piece, _ in found) or len(weights) not in (0, len(found)):
        raise ValueError(
            f"{', '.join(map(str, texts))}: paths of a mixture are written "
            '"a.jsonl:0.7,b.jsonl:0.3", each with a weight, or none with one'
        )
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"{', '.join(map(str, texts))}: weights must be positive, got {weights}")
    return [name for name, _ in found], weights or None


def find_files(path: str) -> list[str]:
    """A file; all of a directory that end in one of :data:`SUFFIXES`; those of a glob; sorted.

    ValueError if there are none.
    """
    place = files.Path(path)
    if place.is_dir():
        found = [p for p in place.iterdir() if p.name.lower().endswith(SUFFIXES)]
        if not found:
            raise ValueError(f"{path}: the directory has no files {', '.join(SUFFIXES)}")
    elif set(path) & {*"*?["} and not place.exists():
        local = not files.is_remote(path)
        found = glob.glob(path, recursive=True) if local else place.parent.glob(place.name)
        found = [p for p in found if not files.Path(p).is_dir()]
        if not found:
            raise ValueError(f"{path}: no file has such a name")
    elif not place.exists():
        beside = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
        near = [str(place.with_name(n)) for n in difflib.get_close_matches(place.name, beside)]
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"{path}: no such file or directory{hint}")
    else:
        found = [path]
    return sorted(map(os.fspath, found))


def _objects(path: str, wanted: str, report: collections.Counter[str]) -> Iterator[tuple[Any, str]]:
    """Each row of a file, or the ValueError about it, and its origin."""
    if path.lower().endswith(".parquet"):
        yield from _parquet_rows(path)
        return
    lines, dropped = _lines(path)
    report.update(dropped)
    for line in lines:
        try:
            _check_not_blank(line)
            yield _parse(*line, wanted), line.origin
        except ValueError as error:
            yield error, line.origin


def _parquet_rows(path: str) -> Iterator[tuple[dict[str, Any], str]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise missing_package(f"{path}: Parquet", "data", error) from error
    number = 0
    with files.Path(path).open("rb") as file:
        try:
            for batch in parquet.ParquetFile(file).iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{path}: row {number}"
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path}: damaged, or not a Parquet file ({error})") from error
    if not number:
        raise ValueError(f"{path}: the file is empty")


def _parse(line: str, origin: str, wanted: str) -> dict[str, Any]:
    array = origin.endswith(":1") and line.lstrip().startswith("[")
    hint = "; a JSON array becomes one object a line by: jq -c '.[]' FILE" if array else ""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{origin}: not JSON, {error.msg} at column {error.colno}{hint}"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{origin}: not usable, the JSON is nested too deeply") from error
    except ValueError as error:  # of an integer with thousands of digits
        raise ValueError(f"{origin}: not usable, {error}") from error
    if not isinstance(record, dict):
        raise ValueError(
            f"{origin}: expected a JSON object with {wanted}, got {type(record).__name__}{hint}"
        )
    return record


@dataclasses.dataclass(frozen=True)
class StreamedTexts:
    """A field of all rows of files, read anew whenever it is iterated over, not kept.

    ``path`` as :func:`find_files`. ValueError names file and line of a row without the field.
    """

    path: str
    field: str

    def __iter__(self) -> Iterator[str]:
        for name in find_files(self.path):
            stream = _parquet_rows if name.lower().endswith(".parquet") else self._rows
            for record, origin in stream(name):
                yield text_field(record, self.field, origin)

    def _rows(self, name: str) -> Iterator[tuple[dict[str, Any], str]]:
        path = files.Path(name)
        decompress, _ = _SUFFIXES.get(path.suffix.lower(), (contextlib.nullcontext, b""))
        with path.open("rb") as raw, decompress(raw) as file:
            for number, line in enumerate(file, start=1):
                origin = f"{name}:{number}"
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{origin}: not UTF-8 ({error.reason})") from error
                yield _parse(text, origin, f"a field {self.field!r}"), origin

    def identity(self) -> list[tuple[str, int, int]]:
        """Names, sizes and times of change (ns; s in a bucket) of the files, and the field.

        A JSON value that stands for the texts.
        """
        paths = map(files.Path, find_files(self.path))
        return [*((str(p), files.size(p), files.changed(p)) for p in paths), (self.field, 0, 0)]


def field(record: Mapping[str, Any], path: str, origin: str) -> Any:
    """The value of a key, or else at a dotted path, with lists by index: ``"turns.0.text"``.

    ValueError, naming ``origin`` and what there is, if it is missing.
    """
    if path in record:
        return record[path]
    value, done = record, ""
    for part in path.split("."):
        place = f"{done!r}" if done else "the line"
        if isinstance(value, Mapping):
            if part not in value:
                raise ValueError(f"{origin}: no field {path!r}; {place} has {sorted(value)}")
            value = value[part]
        elif isinstance(value, list):
            if not re.fullmatch(r"-?[0-9]{1,9}", part) or not -len(value) <= int(part) < len(value):
                raise ValueError(f"{origin}: no field {path!r}; {place} is a list of {len(value)}")
            value = value[int(part)]
        else:
            kind = type(value).__name__
            raise ValueError(f"{origin}: no field {path!r}; {place} is of type {kind}")
        done = f"{done}.{part}" if done else part
    return value


def text_field(record: Mapping[str, Any], path: str, origin: str) -> str:
    """:func:`field` that is a string, of valid Unicode; ValueError otherwise."""
    return _checked_text(field(record, path, origin), path, origin)


def _checked_text(value: Any, path: str, origin: str) -> str:
    if not isinstance(value, str):
        kind = type(value).__name__
        raise ValueError(f"{origin}: field {path!r} must be a string, got {kind}")
    try:
        utf8(value)
    except ValueError as error:
        raise ValueError(f"{origin}: field {path!r}: {error}") from error
    return value


@dataclasses.dataclass(frozen=True)
class Template:
    """A text with fields in braces, ``"Q: {question}\\nA:"``.

    Fields are paths as of :func:`field`, strings or numbers; ``{{`` is a brace, and ``\\n``,
    ``\\t`` and ``\\\\`` are escapes, for command lines. ValueError, naming ``setting``, for other
    forms.
    """

    text: str
    setting: str

    def __post_init__(self):
        self._pieces()

    def _pieces(self) -> list[tuple[str, str | None]]:
        try:
            parsed = list(string.Formatter().parse(self.text))
            if any(spec or conversion for _, _, spec, conversion in parsed):
                raise ValueError("fields have no format after : or !")
            if not any(name for _, name, _, _ in parsed):
                raise ValueError("there is no field in braces")
            if any(name == "" for _, name, _, _ in parsed):
                raise ValueError("a field has no name")
        except ValueError as error:
            raise ValueError(
                f"{self.setting}={self.text!r}: {error}; write it as in "
                '"Q: {question}\\nA:", and a brace as {{'
            ) from error
        return [(_unescaped(literal), name) for literal, name, _, _ in parsed]

    def fill(self, record: Mapping[str, Any], origin: str) -> str:
        """The text of a record; ValueError, naming ``origin``, for a missing or wrong field."""
        text = ""
        for literal, name in self._pieces():
            text += literal
            if name is None:
                continue
            value = field(record, name, origin)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            text += str(value) if number else _checked_text(value, name, origin)
        return text


def _unescaped(text: str) -> str:
    known = {"n": "\n", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nt\\])", lambda match: known[match[1]], text)


def lines_of(records: Iterable[Record]) -> Iterator[Line]:
    """All strings of records, with their origins."""
    for record in records:
        for value in record.values:
            if isinstance(value, str):
                yield Line(value, record.origin)
