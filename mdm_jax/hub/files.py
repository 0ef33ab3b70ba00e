"""Directories in the layout of Hugging Face: config.json and safetensors, read slice by slice.

Only data is read: a pickle (``.bin``, ``.pt``, ``.ckpt``) can run code when it is opened and is
refused.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  by which NumPy knows bfloat16
import numpy as np

from mdm_jax import distributed

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object of a file; ValueError, naming it, if it is missing or not one."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; give a directory of a model") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON in UTF-8 ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


class TensorFiles:
    """Tensors of one safetensors file, or of shards with an index, by name.

    Attributes:
        shapes, dtypes: of every tensor; the latter as NumPy names ("bfloat16").
        file_of: name of the file that holds it.

    ValueError, naming the file, if there are no safetensors, a shard is missing or damaged, the
    index and the shards disagree, or a tensor is not of floating point.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = pathlib.Path(directory)
        self._open = _import_safetensors().safe_open
        self._handles = {name: self._opened(name) for name in self._file_names()}
        self.file_of: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for file, handle in self._handles.items():
            for name in handle.keys():  # noqa: SIM118  not a mapping
                if name in self.file_of:
                    raise ValueError(f"{directory}: {name} is in {self.file_of[name]} and {file}")
                piece = handle.get_slice(name)
                if piece.get_dtype() not in _DTYPES:
                    raise ValueError(
                        f"{self.directory / file}: {name} has dtype {piece.get_dtype()}; weights "
                        f"must be {', '.join(_DTYPES)} (quantised checkpoints are not supported)"
                    )
                self.file_of[name] = file
                self.shapes[name] = tuple(piece.get_shape())
                self.dtypes[name] = _DTYPES[piece.get_dtype()]
        if (self.directory / INDEX).exists():
            self._check_index()

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """A tensor, or the part at ``index``, copied from the mapped file; nothing else is read."""
        piece = self._handles[self.file_of[name]].get_slice(name)
        if not self.shapes[name]:
            return self._handles[self.file_of[name]].get_tensor(name)
        return piece[index if index else ...]

    def _file_names(self) -> list[str]:
        if (self.directory / INDEX).exists():
            return sorted(set(self._weight_map().values()))
        if (self.directory / _SINGLE).exists():
            return [_SINGLE]
        if not self.directory.is_dir():
            raise ValueError(f"{self.directory}: not a directory")
        pickles = sorted(p.name for p in self.directory.iterdir() if p.suffix in _PICKLES)
        if pickles:
            raise ValueError(
                f"{self.directory}: weights in {', '.join(pickles)} are pickles, which may run "
                "code when opened, and are refused. Where torch is installed, "
                "python -m experiments.convert_pickle writes them as safetensors (weights only)"
            )
        raise ValueError(f"{self.directory}: no {_SINGLE} and no {INDEX}")

    def _weight_map(self) -> dict[str, str]:
        path = self.directory / INDEX
        weights = read_json(path).get("weight_map")
        if not isinstance(weights, dict) or not weights:
            raise ValueError(f"{path}: needs a weight_map, tensor name to file name")
        for name, file in weights.items():
            if not isinstance(file, str) or pathlib.PurePath(file).name != file:
                raise ValueError(
                    f"{path}: {name} must be in a file of this directory, got {file!r}"
                )
        return weights

    def _check_index(self) -> None:
        stated = self._weight_map()
        for name in stated.keys() | self.file_of.keys():
            if stated.get(name) != self.file_of.get(name):
                raise ValueError(
                    f"{self.directory / INDEX}: says that {name} is in {stated.get(name)}, the "
                    f"shards have it in {self.file_of.get(name)}"
                )

    def _opened(self, file: str) -> Any:
        path = self.directory / file
        if not path.is_file():
            raise ValueError(f"{path}: missing, though the index names it; download it again")
        try:
            return self._open(path, "numpy")
        except _import_safetensors().SafetensorError as error:
            raise ValueError(
                f"{path}: damaged or cut short ({error}); download it again"
            ) from error


def write_tensors(
    directory: pathlib.Path,
    tensors: Mapping[str, Callable[[], np.ndarray]],
    sizes: Mapping[str, int],
    max_shard_size: int,
) -> None:
    """Write tensors into an existing directory, as one file or as shards with an index.

    Each is made when its turn comes; ``sizes`` are their bytes. A shard is as large as possible up
    to ``max_shard_size`` bytes and is alone in memory. Process 0 writes, all make the tensors.
    """
    from safetensors.numpy import save_file

    shards: list[list[str]] = [[]]
    filled = 0
    for name in tensors:
        if shards[-1] and filled + sizes[name] > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += sizes[name]
    weights = {}
    for number, names in enumerate(shards, 1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        content = {name: np.asarray(tensors[name](), order="C") for name in names}
        weights |= dict.fromkeys(names, file)
        if distributed.is_first():
            save_file(content, directory / file, metadata={"format": "pt"})
    if len(shards) > 1 and distributed.is_first():
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weights}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def copy_side_files(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copy what lies beside the weights: tokenizer, templates, code of the original class."""
    for path in sorted(source.iterdir()):
        weights = path.suffix == ".safetensors" or path.suffix in _PICKLES or path.name == INDEX
        if path.is_file() and not weights and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


def _import_safetensors() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            "mdm_jax.hub needs the package safetensors: pip install safetensors"
        ) from error
    return safetensors
