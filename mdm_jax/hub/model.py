"""Load a directory as a model, and save one in its family's own layout."""

import collections
import dataclasses
import functools
import json
import os
import pathlib
import re
import tempfile
import warnings
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax import distributed, sharding
from mdm_jax.hub import dit, files, leaves, transformers
from mdm_jax.hub.family import Family, Traits, Unsupported, find_family, refuse
from mdm_jax.types import Array, PyTree

FAMILIES: tuple[Family, ...] = (*transformers.FAMILIES, *dit.FAMILIES)
_SETTINGS = ("attention", "remat", "scan_layers")


@dataclasses.dataclass(frozen=True, eq=False)
class HubModel:
    """A model with its parameters.

    Attributes:
        directory: where it was read.
        raw_config: config.json, unknown fields included.
        config, model: of the linen module, and the module.
        traits, family: how it is used; its layout.
        params: {"params": ...}, jax.Arrays.
    """

    directory: pathlib.Path
    raw_config: Mapping[str, Any]
    config: Any
    model: nn.Module
    traits: Traits
    family: Family
    params: PyTree

    def logits(self, input_ids: Any, attention_mask: Any | None = None, **inputs: Any) -> Array:
        """[N, L, K] float32, exactly those of the original class, before any shift.

        ``input_ids`` [N, L]; ``attention_mask`` [N, L], 1 for tokens and 0 for padding. Other
        inputs are the family's: ``timesteps`` [N] of models with a noise level; block models take
        their training input.
        """
        ids = jnp.asarray(input_ids)
        if not jnp.issubdtype(ids.dtype, jnp.floating):  # Duo takes distributions too
            ids = ids.astype(jnp.int32)
        mask = None if attention_mask is None else jnp.asarray(attention_mask) != 0
        return self.family.logits(self.model, self.params, self.traits, ids, mask, **inputs)


def load(
    source: str | os.PathLike,
    *,
    dtype: str | np.dtype | None = None,
    param_dtype: str | np.dtype | None = None,
    mesh: jax.sharding.Mesh | None = None,
    **settings: Any,
) -> HubModel:
    """Read a directory in the layout of Hugging Face.

    Args:
        source: the directory, or a model id such as "GSAI-ML/LLaDA-8B-Instruct", downloaded by
            ``huggingface_hub`` if that is installed.
        dtype: of products, "float32" or "bfloat16" as a rule; None: as in the files.
        param_dtype: of parameters; None: ``dtype``. Training wants "float32" under a narrower
            ``dtype``.
        mesh: parameters are sharded over it (``sharding.make_mesh``), each read where it belongs;
            None: one device. A warning names what it does not divide.
        settings: of the module's config that do not change its numbers: ``attention``, ``remat``,
            ``scan_layers``.

    ValueError, naming file and field or tensor, if the directory is not that of a supported model.
    """
    if unknown := sorted(settings.keys() - _SETTINGS):
        raise TypeError(
            f"load() has no setting {', '.join(unknown)}; it has {', '.join(_SETTINGS)}, and what "
            "changes the numbers stands in config.json"
        )
    directory = resolve(source)
    raw = files.read_json(directory / "config.json")
    family = find_family(raw, str(directory / "config.json"), FAMILIES)
    try:
        refuse(raw, quantization_config=())
        config, traits = family.read_config(raw)
    except Unsupported as error:
        raise Unsupported(f"{directory}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    tensors = files.TensorFiles(directory)
    traits = family.read_buffers(traits, tensors)
    dtype = _dtype(dtype or _dtype_of(tensors), "dtype")
    param_dtype = _dtype(param_dtype or dtype, "param_dtype")
    config = dataclasses.replace(config, dtype=dtype, param_dtype=param_dtype, **settings)
    model = family.model(config)
    abstract = abstract_params(family, model, mesh)
    found = family.leaves(config)
    params = leaves.load_params(tensors, found, abstract, family.ignored, family.copies(config))
    return HubModel(directory, raw, config, model, traits, family, params)


def save(
    directory: str | os.PathLike,
    model: HubModel,
    *,
    params: PyTree | None = None,
    dtype: str | np.dtype | None = None,
    max_shard_size: int = 5 * 10**9,
) -> pathlib.Path:
    """Write a model in its family's layout to a new directory, readable by its original class.

    config.json keeps the fields that it had; tensors that are no parameters and files beside the
    weights are copied. Tensors that were not changed are the same to the bit.

    Args:
        params: in place of the model's own, of the same shapes.
        dtype: of all tensors; None: as they were in the files, to which what was loaded in
            another dtype is converted back.
        max_shard_size: bytes of a file, unless a tensor alone has more.

    ValueError if the directory exists and is not empty.
    """
    directory = pathlib.Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory}: exists and is not empty; name a new directory")
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size must be at least 1 byte, got {max_shard_size}")
    wanted = None if dtype is None else _dtype(dtype, "dtype").name
    original = files.TensorFiles(model.directory)
    tensors = leaves.tensors_of(params or model.params, model.family.leaves(model.config))
    own = _dtype_of(original)
    tensors = {
        name: tensor._replace(dtype=wanted or original.dtypes.get(name, own))
        for name, tensor in tensors.items()
    }
    for name, source in model.family.copies(model.config).items():
        if name in original.shapes:
            tensors[name] = tensors[source]
    for name, shape in original.shapes.items():
        if re.fullmatch(model.family.ignored, name):
            read = functools.partial(original.read, name)
            tensors[name] = files.Tensor(shape, original.dtypes[name], read)
    if not distributed.is_first():
        files.write_tensors(directory, tensors, max_shard_size)
        return directory
    config = dict(model.raw_config)
    if wanted is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = wanted
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as made_in:
        target = pathlib.Path(made_in, "model")
        target.mkdir()
        files.write_tensors(target, tensors, max_shard_size)
        (target / "config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8"
        )
        files.copy_side_files(model.directory, target)
        target.replace(directory)  # an empty directory of this name gives way
    return directory


def bidirectional(model: HubModel) -> HubModel:
    """A causal model as the A2D model of the same weights, from which a conversion starts.

    ValueError for families that have no such counterpart.
    """
    names = {family.name: family for family in FAMILIES}
    family = names.get(f"a2d-{model.family.name}")
    if family is None:
        known = [name.removeprefix("a2d-") for name in names if name.startswith("a2d-")]
        raise ValueError(
            f"a model of the family {model.family.name} has no bidirectional counterpart; those of "
            f"{', '.join(known)} have"
        )
    raw = {**model.raw_config, "architectures": list(family.architectures)}
    raw["model_type"] = family.name
    traits = dataclasses.replace(model.traits, attention="bidirectional")
    return dataclasses.replace(model, raw_config=raw, traits=traits, family=family)


def resolve(source: str | os.PathLike) -> pathlib.Path:
    """The directory that ``source`` names, downloaded if it is a model id and no directory."""
    directory = pathlib.Path(source).expanduser()
    if directory.is_dir():
        return directory
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise ValueError(
            f"{source}: no such directory; name one with config.json and safetensors, or a model "
            "id such as GSAI-ML/LLaDA-8B-Instruct"
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            f"{source}: no such directory; to download a model of this id, "
            "pip install huggingface_hub"
        ) from error
    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "*.py"]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise ValueError(
            f"{source}: no such directory, and it could not be downloaded ({error}); where there "
            f"is no net, run `hf download {source} --local-dir DIR` elsewhere and name DIR"
        ) from error


def abstract_params(family: Family, model: nn.Module, mesh: jax.sharding.Mesh | None) -> PyTree:
    """Shapes, dtypes and shardings of the parameters, which are not computed."""

    def init() -> PyTree:
        return model.init(jax.random.key(0), *family.example)

    if mesh is not None:
        for message in sharding.kept_whole(init, mesh):
            warnings.warn(message, stacklevel=3)
        return sharding.abstract_sharded(init, mesh)
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def abstract(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(abstract, nn.meta.unbox(jax.eval_shape(init)))


def _dtype_of(tensors: files.TensorFiles) -> str:
    """The dtype of most weights; buffers may have another."""
    return collections.Counter(tensors.dtypes.values()).most_common(1)[0][0]


def _dtype(name: str | np.dtype, setting: str) -> np.dtype:
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in files.FLOATS:
        raise ValueError(f"{setting} must be one of {', '.join(files.FLOATS)}, got {name!r}")
    return dtype
