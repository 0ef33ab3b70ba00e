"""Weights of a pickle (``.bin``, ``.pt``, ``.ckpt``) as safetensors, where torch is installed.

python -m experiments.convert_pickle SOURCE TARGET [--config=CONFIG.JSON] [--raw]

SOURCE is a directory with config.json and ``.bin`` files, or one file; TARGET a new directory that
``mdm_jax.hub.load`` reads. A training checkpoint (with ``state_dict``) usually holds a moving
average of the weights too, ``ema.shadow_params``, by which published numbers are measured: that is
taken unless ``--raw``. A single file needs a config.json from elsewhere. Only tensors are read
(``weights_only``): objects of other classes stand there as empty shells, and no code of the pickle
runs.
"""

import argparse
import functools
import pathlib
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  by which NumPy knows bfloat16
import numpy as np

from mdm_jax.hub import files

_BUFFERS = r"(.*\.)?(inv_freq|sampling_eps_(min|max))"
"""Names of a ``state_dict`` that are no parameters, so not averaged."""

_BIN_INDEX = "pytorch_model.bin.index.json"


class Shell:
    """Stands for an object of any class; keeps nothing."""

    def _ignore(self, *args: Any, **kwargs: Any) -> None:
        pass

    __init__ = __setstate__ = __setitem__ = append = extend = update = _ignore


def weights(checkpoint: Mapping[str, Any], raw: bool = False) -> dict[str, Any]:
    """Tensors by name of what ``torch.load`` gives, averaged ones where there are any, unless raw.

    Averages are a list in the order of the parameters, without buffers, which are taken as they
    are. ValueError if there are no tensors, or the averages do not fit.
    """
    tensors = checkpoint.get("state_dict", checkpoint)
    tensors = {
        name: value
        for name, value in (tensors.items() if isinstance(tensors, Mapping) else ())
        if hasattr(value, "shape")
    }
    if not tensors:
        raise ValueError(f"no tensors by name; its entries are {', '.join(map(str, checkpoint))}")
    ema = checkpoint.get("ema")
    averages = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    return tensors if raw or averages is None else averaged(tensors, averages)


def averaged(tensors: Mapping[str, Any], averages: Sequence[Any]) -> dict[str, Any]:
    """``tensors`` with the moving averages in place of the parameters."""
    names = [name for name in tensors if not re.fullmatch(_BUFFERS, name)]
    wrong = [
        f"{name} {tuple(tensors[name].shape)} against {tuple(average.shape)}"
        for name, average in zip(names, averages)
        if tuple(tensors[name].shape) != tuple(average.shape)
    ]
    if wrong or len(names) != len(averages):
        raise ValueError(
            f"the moving averages, {len(averages)}, are not those of the {len(names)} parameters"
            + (f": {wrong[0]}" if wrong else "")
            + "; --raw takes the weights themselves"
        )
    return {**tensors, **dict(zip(names, averages))}


def read(path: pathlib.Path) -> Mapping[str, Any]:
    """What a file holds, with shells for all that is no tensor, number, text, list or dictionary.

    ValueError, naming the file, if it is damaged or does something else than hold data.
    """
    import pickle

    import torch

    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Shell, name) for name in found]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        # What torch writes around its reason advises to run the code of the pickle.
        advice = r"(Weights only load failed|Please file an issue|Check the documentation).*"
        reason = " ".join(re.sub(advice, "", str(error)).split())
        raise ValueError(
            f"{path}: cannot be read as weights alone ({reason}); where it was made, "
            'torch.save({"state_dict": model.state_dict()}, FILE) writes such a file'
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path}: holds a {type(checkpoint).__name__}, no tensors by name")
    return checkpoint


def sources(source: pathlib.Path) -> list[pathlib.Path]:
    """The files of SOURCE; ValueError if it has none."""
    if source.is_file():
        return [source]
    if (source / _BIN_INDEX).exists():
        names = set(files.read_json(source / _BIN_INDEX)["weight_map"].values())
        return [source / pathlib.PurePath(name).name for name in sorted(names)]
    found = sorted(p for p in source.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    found = [p for p in found if p.name != "training_args.bin"]
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise ValueError(f"{source}: expected one file of weights, found {names}; name the file")
    return found


def convert(
    source: pathlib.Path,
    target: pathlib.Path,
    config: pathlib.Path | None = None,
    raw: bool = False,
    max_shard_size: int = 5 * 10**9,
) -> list[str]:
    """Write ``target``; returns names of tensors. ValueError if it exists or has no config."""
    paths = sources(source)
    config = config or (source if source.is_dir() else source.parent) / "config.json"
    if not config.is_file():
        raise ValueError(f"{config}: no such file; name the model's config.json with --config")
    if target.exists():
        raise ValueError(f"{target}: exists; name a new directory")
    tensors: dict[str, Any] = {}
    for path in paths:
        try:
            tensors |= weights(read(path), raw)
        except ValueError as error:
            named = str(error).startswith(str(path))
            raise error if named else ValueError(f"{path}: {error}") from error
    tensors = without_twins(tensors.items())
    target.mkdir(parents=True)
    made = {
        name: files.Tensor(
            tuple(value.shape),
            str(value.dtype).removeprefix("torch."),
            functools.partial(as_numpy, value),
        )
        for name, value in sorted(tensors.items())
    }
    files.write_tensors(target, made, max_shard_size)
    shutil.copyfile(config, target / "config.json")
    if source.is_dir():
        files.copy_side_files(source, target)
    return list(made)


def without_twins(tensors: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Tensors by name, of those that share all their memory (tied weights) the first alone."""
    seen: dict[tuple, Any] = {}
    for name, value in tensors:
        place = (value.data_ptr() or name, tuple(value.shape), value.stride(), value.dtype)
        seen.setdefault(place, (name, value))
    return dict(seen.values())


def as_numpy(tensor: Any) -> np.ndarray:
    """A tensor of torch in NumPy, bfloat16 too."""
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view("bfloat16")
    return tensor.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("target", type=pathlib.Path)
    parser.add_argument("--config", type=pathlib.Path)
    parser.add_argument("--raw", action="store_true", help="not the moving average")
    options = parser.parse_args()
    try:
        names = convert(options.source, options.target, options.config, options.raw)
    except (ValueError, ImportError) as error:
        raise SystemExit(f"convert_pickle: {error}") from error
    print(f"{options.target}: {len(names)} tensors")


if __name__ == "__main__":
    main()
