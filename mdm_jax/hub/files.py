"""Directories in the layout of Hugging Face: config.json and safetensors, read piece by piece.

Only data is read: a pickle (``.bin``, ``.pt``, ``.ckpt``) can run code when it is opened and is
refused. The reader and the writer are our own (the format is a JSON header and the bytes), since
those of the package ``safetensors`` hold a whole file in memory.
"""

import contextlib
import hashlib
import json
import math
import mmap
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  by which NumPy knows bfloat16
import numpy as np

from mdm_jax import distributed

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "BOOL": "bool",
} | {f"{kind}{bits}": f"{word}{bits}" for kind, word in (("I", "int"), ("U", "uint"))
     for bits in (8, 16, 32, 64)}  # fmt: skip
FLOATS = ("float64", "float32", "float16", "bfloat16")
"""Dtypes that weights may have."""
SIDE_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "*.py", "*.md", "LICENSE*", "NOTICE*")
"""What may lie beside the weights: tokenizer, templates, code of the original class."""
NOTES = "mdm_jax.json"
"""Our own file in a directory without weights: where it is from, and dtypes of the tensors."""
_CHUNK = 2**21  # bytes that a thread maps into memory at a time
_LONGEST_HEADER = 10**8


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object of a file; ValueError, naming it, if it is missing or not one."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; give a directory of a model") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON in UTF-8 ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


class TensorFiles:
    """Tensors of one safetensors file (``single``), or of shards with an index, by name.

    Attributes:
        shapes, dtypes: of every tensor; the latter as NumPy names ("bfloat16").
        file_of: name of the file that holds it.

    ValueError, naming the file, if there are no safetensors, a shard is missing or damaged, or the
    index and the shards disagree.
    """

    def __init__(self, directory: str | os.PathLike, single: str = _SINGLE):
        self.directory, self._single = pathlib.Path(directory), single
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.file_of: dict[str, str] = {}
        self._starts: dict[str, int] = {}
        self._maps: dict[str, mmap.mmap] = {}
        index = self._weight_map()
        for file in sorted(set(index.values())) if index else [single]:
            self._open(file)
        for name in index.keys() | self.file_of.keys() if index else ():
            if index.get(name) != self.file_of.get(name):
                raise ValueError(
                    f"{self.directory / INDEX}: says that {name} is in {index.get(name)}, the "
                    f"shards have it in {self.file_of.get(name)}"
                )

    def chunks(self, name: str, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Runs of rows (start, stop) of a tensor, about 2 MiB each; a scalar is one row."""
        rows = self._rows_of_chunk(name)
        for start in range(first, stop, rows):
            yield start, min(start + rows, stop)

    def read(self, name: str) -> np.ndarray:
        """A whole tensor."""
        out = np.empty(self.shapes[name], self.dtypes[name])
        rows = out.reshape(-1) if out.ndim == 0 else out
        for start, stop in self.chunks(name, 0, len(rows)):
            with self.rows(name, start, stop) as values:
                rows[start:stop] = values
        return out

    def are_equal(self, one: str, other: str) -> bool:
        """Whether two tensors are the same to the bit."""
        if (self.shapes[one], self.dtypes[one]) != (self.shapes[other], self.dtypes[other]):
            return False
        for part in self.chunks(one, 0, (self.shapes[one] or (1,))[0]):
            with self.rows(one, *part) as a, self.rows(other, *part) as b:
                if a.tobytes() != b.tobytes():
                    return False
        return True

    def _rows_of_chunk(self, name: str) -> int:
        size = math.prod(self.shapes[name][1:]) * np.dtype(self.dtypes[name]).itemsize
        return max(1, _CHUNK // max(1, size))

    @contextlib.contextmanager
    def rows(self, name: str, first: int, stop: int) -> Iterator[np.ndarray]:
        """Rows of a tensor in the mapped file, whose pages are given back; a scalar is a row."""
        count = stop - first
        inner, dtype = self.shapes[name][1:], np.dtype(self.dtypes[name])
        size, mapped = math.prod(inner), self._maps[self.file_of[name]]
        start = self._starts[name] + first * size * dtype.itemsize
        values = np.frombuffer(mapped, dtype, count * size, start)
        yield values.reshape(count, *inner)
        page = start - start % mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED, page, start + values.nbytes - page)

    def _weight_map(self) -> dict[str, str]:
        """Tensor name -> shard by the index; empty if a single file holds everything."""
        if (self.directory / self._single).exists():  # the original classes look for it first
            return {}
        path = self.directory / INDEX
        if not path.exists():
            self._refuse_empty()
        weights = read_json(path).get("weight_map")
        if not isinstance(weights, dict) or not weights:
            raise ValueError(f"{path}: needs a weight_map, tensor name to file name")
        for name, file in weights.items():
            plain = isinstance(file, str) and pathlib.PureWindowsPath(file).name == file
            if not plain or not file.endswith(".safetensors"):
                raise ValueError(
                    f"{path}: {name} must be in a .safetensors file of this directory, got {file!r}"
                )
        return weights

    def _refuse_empty(self) -> None:
        if not self.directory.is_dir():
            raise ValueError(f"{self.directory}: not a directory")
        pickles = sorted(p.name for p in self.directory.iterdir() if p.suffix in _PICKLES)
        if pickles:
            raise ValueError(
                f"{self.directory}: weights in {', '.join(pickles)} are pickles, which may run "
                "code when opened, and are refused. Where torch is installed, "
                "python -m experiments.convert_pickle writes them as safetensors (weights only)"
            )
        raise ValueError(f"{self.directory}: no {self._single} and no {INDEX}")

    def _open(self, file: str) -> None:
        path = self.directory / file
        if not path.is_file():
            raise ValueError(f"{path}: missing, though the index names it; download it again")
        with path.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            start = opened.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise ValueError(f"{path}: a pointer of git LFS, not the file; run `git lfs pull`")
            if len(start) < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise _damaged(path, f"no header in its {size} bytes")
            try:
                header = json.loads(opened.read(length))
                header.pop("__metadata__", None)
                entries = {name: _entry(value) for name, value in header.items()}
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise _damaged(path, f"header: {error!r}") from error
            # Nothing may be missing at the end, lie outside, or belong to two tensors.
            at = 0
            for name, entry in sorted(entries.items(), key=lambda item: item[1].offsets):
                bytes_ = math.prod(entry.shape) * np.dtype(entry.dtype).itemsize
                if entry.offsets != (at, at + bytes_):
                    raise _damaged(path, f"{name} of {bytes_} bytes at {list(entry.offsets)}")
                at += bytes_
            if at != size - 8 - length:
                raise _damaged(path, f"holds {size - 8 - length} of {at} bytes of tensors")
            self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        for name, entry in entries.items():
            if name in self.file_of:
                raise ValueError(f"{self.directory}: {name} is in {self.file_of[name]} and {file}")
            self.file_of[name], self.shapes[name] = file, entry.shape
            self.dtypes[name], self._starts[name] = entry.dtype, 8 + length + entry.offsets[0]


class _Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, int]


def _entry(value: Mapping[str, Any]) -> _Entry:
    numbers = [*value["shape"], *value["data_offsets"]]
    if len(value["data_offsets"]) != 2 or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"no tensor: {value}")
    if value["dtype"] not in _DTYPES:
        raise ValueError(f"dtype {value['dtype']}; known are {', '.join(_DTYPES)}")
    return _Entry(_DTYPES[value["dtype"]], tuple(value["shape"]), tuple(value["data_offsets"]))


def _damaged(path: pathlib.Path, why: str) -> ValueError:
    return ValueError(f"{path}: damaged or cut short ({why}); download it again")


class Tensor(NamedTuple):
    """A tensor to be written, made when its turn comes; dtype as a NumPy name."""

    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write_tensors(
    directory: pathlib.Path, tensors: Mapping[str, Tensor], max_shard_size: int
) -> None:
    """Write tensors into an existing directory, as one file or as shards with an index.

    A shard is as large as possible up to ``max_shard_size`` bytes; one tensor at a time is in
    memory. Process 0 writes, all make the tensors.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(tensors):
        if shards[-1] and filled + tensors[name].size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensors[name].size
    weights = {}
    for number, names in enumerate(shards, 1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        names.sort(key=lambda name: (-np.dtype(tensors[name].dtype).itemsize, name))  # aligned
        weights |= dict.fromkeys(names, file)
        write_file(directory / file, {name: tensors[name] for name in names})
    if len(shards) > 1 and distributed.is_first():
        size = sum(tensor.size for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weights.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def write_file(path: pathlib.Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into one file; process 0 writes, all make the tensors."""
    codes = {name: code for code, name in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        offsets = [at, at := at + tensor.size]
        entry = {"dtype": codes[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
        header[name] = entry
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") if distributed.is_first() else open(os.devnull, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            value = np.ascontiguousarray(tensor.make().astype(tensor.dtype, copy=False))
            file.write(value.reshape(-1).view(np.uint8))


def copy_side_files(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copy :data:`SIDE_FILES` that ``target`` has not; indices belong to the weights."""
    for path in sorted({path for pattern in SIDE_FILES for path in source.glob(pattern)}):
        own = path.name.endswith(".index.json") or path.name == NOTES
        if path.is_file() and not own and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


def fingerprint(directory: pathlib.Path) -> str:
    """SHA-256, hexadecimal, of config.json, the tokenizer and the weights, read once."""
    digest = hashlib.sha256()
    names = ("config.json", "tokenizer*.json", "*.safetensors")
    for path in sorted({path for name in names for path in directory.glob(name)}):
        with path.open("rb") as file:
            digest.update(
                f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode()
            )
    return digest.hexdigest()
