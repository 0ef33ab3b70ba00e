"""Files of a run, on disk or in a bucket: written whole or not at all, errors that name them."""

import fnmatch
import json
import os
import pathlib
import re
import secrets
from collections.abc import Iterator
from typing import Any

from etils.epath import gpath


class Path(gpath.PosixGPath):
    """An ``epath.Path`` (local or ``gs://``) whose ``glob`` takes the directory as it is written.

    Orbax finds the files of a checkpoint by ``glob``, which would read "lr[0.1]" as a pattern.
    """

    def glob(self, pattern: str) -> Iterator["Path"]:
        folder, _, name = pattern.rpartition("/")
        paths = (self / folder).iterdir() if (self / folder).exists() else ()
        return (path for path in paths if fnmatch.fnmatchcase(path.name, name))


def as_path(path: str | os.PathLike) -> Path:
    """``path`` as a :class:`Path`; ValueError for one in which Orbax could not save."""
    text = os.fspath(path)
    scheme, separator, _ = text.partition("://")
    if separator and scheme != "gs":
        raise ValueError(f"{text}: a run is kept in a local directory or in gs://BUCKET/DIRECTORY")
    if bad := {*text} & {*("\\[]*?#;\n\r\t" if separator else "\\")}:
        # Separators to TensorStore and Orbax, or patterns to gcsfs: files would go elsewhere.
        raise ValueError(f"{text}: checkpoints cannot be kept below a name with {sorted(bad)}")
    if not separator and re.search(r"^/(gs|s3|az|hf)(/|$)|/gs:(/|$)", os.path.abspath(text)):
        raise ValueError(f"{text}: epath takes this name for a bucket; buckets are gs://BUCKET/...")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{text!r}: checkpoints need a path in UTF-8") from error
    return path if isinstance(path, Path) else Path(text)


def absolute(path: str | os.PathLike) -> Path:
    """:func:`as_path` from the root, without resolving links."""
    path = as_path(path)
    return path if is_remote(path) else Path(pathlib.Path(path).absolute())


def is_remote(path: str | os.PathLike) -> bool:
    """Whether the path is in a bucket, where objects appear whole and nothing is appended."""
    return os.fspath(path).startswith("gs://")


def below(directory: Path) -> Iterator[Path]:
    """The files in a directory, at any depth."""
    # epath's walk forgets the "gs://" of what it comes by.
    for path in sorted(directory.iterdir()):
        yield from below(path) if path.is_dir() else (path,)


def size(path: Path) -> int:
    """Bytes of a file."""
    # Local epath.Path.stat fails for users that have no name, as in containers.
    return path.stat().length if is_remote(path) else os.stat(path).st_size


def changed(path: Path) -> int:
    """When a file was last changed, in ns; in a bucket in s."""
    return path.stat().mtime if is_remote(path) else os.stat(path).st_mtime_ns


def write(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file atomically; a new temporary file next to it follows nobody's link."""
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    if is_remote(path):
        path.write_bytes(data)
        return
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def create(path: str | os.PathLike) -> None:
    """Make an empty file; FileExistsError if the name is taken (in a bucket: was a moment ago)."""
    path = Path(path)
    if not is_remote(path):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    elif path.exists():
        raise FileExistsError(path)
    else:
        path.write_bytes(b"")


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write JSON atomically."""
    write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def json_line(content: Any) -> str:
    """A line of a JSON Lines file."""
    return json.dumps(content, ensure_ascii=False) + "\n"


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file; ValueError, naming it, if damaged."""
    try:
        return json.loads(Path(path).read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: not JSON ({error})") from error


def read_records(path: str | os.PathLike, cut_off: bool = False) -> Iterator[tuple[str, Any]]:
    """(``FILE:LINE``, value) of every line of a JSON Lines file; ValueError names the bad line.

    With ``cut_off`` a last line that a kill cut off is left out.
    """
    lines = Path(path).read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            if cut_off and number == len(lines):
                return
            raise ValueError(f"{path}:{number}: not a record in JSON: {line[:80]!r}") from error
        yield f"{path}:{number}", value


def beside(path: Path) -> Path:
    """The first free name of the kind ``metrics.1.jsonl`` next to ``path``."""
    number = 1
    while (other := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return other
