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
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax import distributed
from mdm_jax.hub import dit, files, leaves, transformers
from mdm_jax.hub.family import (
    Family,
    Traits,
    Unsupported,
    abstract_params,
    find_family,
    refuse,
)
from mdm_jax.hub.tokenizer import MASK_TOKEN, HubTokenizer, has_tokenizer
from mdm_jax.models.cross_entropy import Readout, as_logits
from mdm_jax.models.transformer import TransformerConfig
from mdm_jax.types import Array, PyTree

FAMILIES: tuple[Family, ...] = (*transformers.FAMILIES, *dit.FAMILIES)
_SETTINGS = ("attention", "remat", "scan_layers")


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """Tensors of a directory: dtypes by name, and small ones that are no parameters."""

    dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    buffers: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class HubModel:
    """A model with its parameters.

    Attributes:
        directory: where it was read; None for one of our own making.
        raw_config: config.json, unknown fields included.
        config, model: of the linen module, and the module.
        traits, family: how it is used; its layout.
        params: {"params": ...}, jax.Arrays; None where only described.
        tokenizer: None where the directory has none.
        stored: what the directory holds beside parameters, for saving.
    """

    directory: pathlib.Path
    raw_config: Mapping[str, Any]
    config: Any
    model: nn.Module
    traits: Traits
    family: Family
    params: PyTree
    tokenizer: HubTokenizer | None = None
    stored: Stored = Stored()

    def logits(self, input_ids: Any, attention_mask: Any | None = None, **inputs: Any) -> Array:
        """[N, L, K] float32, exactly those of the original class, before any shift.

        ``input_ids`` [N, L]; ``attention_mask`` [N, L], 1 for tokens and 0 for padding. Other
        inputs are the family's: ``timesteps`` [N] of models with a noise level; block models take
        their training input. Compiled once per shape.
        """
        # NumPy arrays, unlike JAX's, may be inputs of a computation over several processes.
        ids, mask = (
            x if isinstance(x, jax.Array | None) else np.asarray(x)
            for x in (input_ids, attention_mask)
        )
        if not jnp.issubdtype(ids.dtype, jnp.floating):  # Duo takes distributions too
            ids = ids.astype(np.int32)
        mask = None if mask is None else mask != 0
        flags = tuple((name, value) for name, value in inputs.items() if isinstance(value, bool))
        arrays = {name: value for name, value in inputs.items() if not isinstance(value, bool)}
        of = {"network": self.family.outputs, "module": self.model, "traits": self.traits}
        return _logits(self.params, ids, mask, arrays, flags=flags, **of)


@functools.partial(jax.jit, static_argnames=("network", "module", "traits", "flags"))
def _logits(
    params: PyTree,
    ids: Array,
    mask: Array | None,
    arrays: Mapping[str, Any],
    *,
    network: Callable[..., Readout | Array],
    module: nn.Module,
    traits: Traits,
    flags: tuple[tuple[str, bool], ...],
) -> Array:
    return as_logits(network(module, params, traits, ids, mask, **arrays, **dict(flags)))


def load(
    source: str | os.PathLike,
    *,
    dtype: str | np.dtype | None = None,
    param_dtype: str | np.dtype | None = None,
    mesh: jax.sharding.Mesh | None = None,
    tokenizer: HubTokenizer | bool = True,
    **settings: Any,
) -> HubModel:
    """Read a directory in the layout of Hugging Face.

    Args:
        source: the directory, or a model id such as "GSAI-ML/LLaDA-8B-Instruct", downloaded by
            ``huggingface_hub`` if that is installed.
        dtype: of products, "float32" or "bfloat16" as a rule; None: as in the files.
        param_dtype: of parameters; None: ``dtype``; "stored": as in the files. Training wants
            "float32" under a narrower ``dtype``.
        mesh: parameters are sharded over it (``sharding.make_mesh``), each read where it belongs;
            None: one device. A warning names what it does not divide.
        tokenizer: one to use instead of the directory's, :meth:`HubTokenizer.read`; False: none.
            Causal and A2D models without a mask token get one at the first free id, as in dllm; a
            warning where that has no row (:func:`with_mask_row`).
        settings: of the module's config that do not change its numbers: ``attention``, ``remat``,
            ``scan_layers``.

    ValueError, naming file and field or tensor, if the directory is not that of a supported model.
    """
    mesh_free = {"dtype": dtype, "param_dtype": param_dtype, "tokenizer": tokenizer}
    model = describe(source, **mesh_free, **settings)
    family, tensors = model.family, files.TensorFiles(model.directory)
    abstract = abstract_params(family, model.model, mesh)
    found, copies = family.leaves(model.config), family.copies(model.config)
    params = leaves.load_params(tensors, found, abstract, family.ignored, copies)
    return dataclasses.replace(model, params=params)


def describe(
    source: str | os.PathLike,
    *,
    dtype: str | np.dtype | None = None,
    param_dtype: str | np.dtype | None = None,
    tokenizer: HubTokenizer | bool = True,
    **settings: Any,
) -> HubModel:
    """As :func:`load`, but without parameters; of an :func:`outline` too."""
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
    stored = _stored(tensors, family)
    own = _most_common(stored.dtypes)
    dtype = _dtype(dtype or own, "dtype")
    param_dtype = _dtype(own if param_dtype == "stored" else param_dtype or dtype, "param_dtype")
    config = dataclasses.replace(config, dtype=dtype, param_dtype=param_dtype, **settings)
    model = family.model(config)
    codec = _tokenizer(directory, family, traits) if tokenizer is True else tokenizer or None
    if codec is not None:
        ids = codec.special_ids._asdict() | {"bos": codec.bos_id}
        ids = {f"{role}_id": i for role, i in ids.items()}
        missing = {name: i for name, i in ids.items() if getattr(traits, name) is None}
        traits = dataclasses.replace(traits, **missing)
    return HubModel(directory, raw, config, model, traits, family, None, codec, stored)


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
    weights are copied. Tensors that were not changed are the same to the bit. All processes call
    it, process 0 writes, and it returns when the directory is there.

    Args:
        params: in place of the model's own, of the same shapes.
        dtype: of all tensors; None: as they were in the files, to which what was loaded in
            another dtype is converted back.
        max_shard_size: bytes of a file, unless a tensor alone has more.

    ValueError if the directory exists and is not empty.
    """
    directory = pathlib.Path(directory)
    if distributed.from_first(directory.exists() and any(directory.iterdir())):
        raise ValueError(f"{directory}: exists and is not empty; name a new directory")
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size must be at least 1 byte, got {max_shard_size}")
    wanted = None if dtype is None else _dtype(dtype, "dtype").name
    stored, tensors = (
        model.stored,
        leaves.tensors_of(params or model.params, model.family.leaves(model.config)),
    )
    if stored.dtypes:
        own = _most_common(stored.dtypes)
        dtypes = {name: wanted or stored.dtypes.get(name, own) for name in tensors}
        tensors = {name: tensors[name]._replace(dtype=dtypes[name]) for name in tensors}
    elif wanted:
        tensors = {name: tensor._replace(dtype=wanted) for name, tensor in tensors.items()}
    for name, source in model.family.copies(model.config).items():
        if name in stored.dtypes:
            tensors[name] = tensors[source]
    tensors |= _buffers(stored)
    if not distributed.is_first():
        files.write_tensors(directory, tensors, max_shard_size)
        distributed.barrier(f"saved {directory}")
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
        if model.tokenizer is not None and model.tokenizer.mask_added:
            model.tokenizer.write(target, model.directory)
        if model.directory is not None:
            files.copy_side_files(model.directory, target)
        target.replace(directory)  # an empty directory of this name gives way
    distributed.barrier(f"saved {directory}")
    return directory


def outline(directory: pathlib.Path, model: HubModel, **notes: Any) -> None:
    """Write what :func:`describe` reads and :func:`save` copies into an existing directory.

    I.e. all but parameters: config.json as it was read, files beside the weights, small tensors,
    and dtypes, with the ``notes`` in :data:`files.NOTES`.
    """
    files.copy_side_files(model.directory, directory)
    files.write_tensors(directory, _buffers(model.stored), 10**9)
    record = notes | {"family": model.family.name, "dtypes": model.stored.dtypes}
    (directory / files.NOTES).write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def of_transformer(config: TransformerConfig, traits: Traits, check: bool = True) -> HubModel:
    """A transformer of our own, without parameters, in the layout of Qwen3, Qwen2 or Llama.

    :class:`Unsupported` names the settings that none of these has; without ``check`` such a model
    runs but cannot be saved. Norms of theirs round in
    bfloat16 where ours may not.
    """
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    name = kind if traits.attention == "causal" else f"a2d-{kind}"
    family = next(family for family in FAMILIES if family.name == name)
    raw = transformers.write_llama(config, name) | {"architectures": list(family.architectures)}
    for role in ("mask", "eos", "pad", "bos"):
        raw[f"{role}_token_id"] = getattr(traits, f"{role}_id")
    raw["max_position_embeddings"] = traits.length
    layout, _ = family.read_config(raw)
    free = {"dtype", "param_dtype", "norm_rounded", "mlp_ratio", *_SETTINGS}
    derived = {"num_kv_heads": "kv_heads", "head_dim": "head_size", "mlp_hidden": "hidden"}
    differing = []
    for entry in dataclasses.fields(config):
        reader = derived.get(entry.name, entry.name)
        own, theirs = getattr(config, reader), getattr(layout, reader)
        if entry.name not in free and own != theirs:
            differing.append(f"{entry.name}={own!r} (it has {theirs!r})")
    if differing and check:
        raise Unsupported(f"the layout of {name} cannot express {', '.join(differing)}")
    return HubModel(None, raw, config, family.model(config), traits, family, None)


def bidirectional(model: HubModel, shift: bool = False) -> HubModel:
    """A causal model as the A2D model of the same weights, from which a conversion starts.

    With ``shift`` logits at i - 1 go on predicting token i, as in DiffuLLaMA (Gong et al. 2024) and
    Dream (Ye et al. 2025); config.json then says ``right_shift_logits``, dllm's name for it, and
    :func:`load` reads it. Without, those at i predict token i, as in dllm's A2D models.
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
    if shift:
        raw["right_shift_logits"] = True
    traits = dataclasses.replace(model.traits, attention="bidirectional", shift=shift)
    codec = model.tokenizer
    if codec is not None:
        codec = codec.replaced(chat_options=codec.chat_options | _chat_options(family))
    return dataclasses.replace(model, raw_config=raw, traits=traits, family=family, tokenizer=codec)


def with_mask_row(
    model: HubModel, init: Literal["mean", "normal"] = "mean", *, key: Array | None = None
) -> HubModel:
    """The model with a row for the mask token of its tokenizer, where a causal one begins training.

    The row of the embedding, and of the head where it has its own, is the mean of the rows of all
    other tokens (as transformers resizes embeddings), or with "normal" drawn by ``key`` with the
    standard deviation ``initializer_range`` of config.json (0.02 if it has none). Where the id lies
    beyond the rows these grow to a multiple of 64, so that meshes divide them, all new ones alike.
    config.json gets ``mask_token_id`` and the new size. Logits of other tokens do not change.

    ValueError for a body other than ``models.Transformer``, no tokenizer, or "normal" without key.
    """
    codec, config = model.tokenizer, model.config
    if codec is None or not isinstance(config, TransformerConfig):
        raise ValueError(
            f"{model.directory}: a mask row needs a tokenizer and a transformer; this model is of "
            f"family {model.family.name}, its tokenizer {codec}"
        )
    if init not in ("mean", "normal") or (init == "normal" and key is None):
        raise ValueError(f"init must be 'mean', or 'normal' with a key; got {init!r} and {key}")
    old, rows = config.vocab_size, config.vocab_size
    if codec.vocab_size > old:
        rows = -(-codec.vocab_size // 64) * 64
    used = ~np.isin(np.arange(old), (codec.mask_id, *codec.unused_ids))
    fresh = np.append(np.arange(old) == codec.mask_id, np.ones(rows - old, bool))
    std = model.raw_config.get("initializer_range", 0.02)

    def grown(table: Array, axis: int, own: Array | None) -> Array:
        @functools.partial(jax.jit, out_shardings=table.sharding)
        def make(table: Array) -> Array:
            values = jnp.moveaxis(table, axis, 0).astype(jnp.float32)
            shape = (rows, values.shape[1])
            if init == "mean":
                filler = jnp.broadcast_to(jnp.mean(values, axis=0, where=used[:, None]), shape)
            else:
                filler = std * jax.random.normal(own, shape)
            values = jnp.pad(values, ((0, rows - old), (0, 0)))
            values = jnp.where(fresh[:, None], filler, values)
            return jnp.moveaxis(values, 0, axis).astype(table.dtype)

        return make(table)

    keys = (None, None) if key is None else jax.random.split(key)
    params = model.params
    if params is not None:
        arrays = dict(params["params"])
        arrays["embedding"] = grown(arrays["embedding"], 0, keys[0])
        if not config.tie_embeddings:
            arrays["head"] = {"kernel": grown(arrays["head"]["kernel"], 1, keys[1])}
        params = {**params, "params": arrays}
    size = "embedding_size" if model.raw_config.get("embedding_size") else "vocab_size"
    config = dataclasses.replace(config, vocab_size=rows)
    return dataclasses.replace(
        model,
        raw_config={**model.raw_config, size: rows, "mask_token_id": codec.mask_id},
        config=config,
        model=model.family.model(config),
        traits=dataclasses.replace(model.traits, vocab_size=rows, mask_id=codec.mask_id),
        params=params,
        tokenizer=codec.replaced(vocab_size=rows),
    )


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
            "pip install 'mdm_jax[hub]'"
        ) from error
    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "*.py"]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise ValueError(
            f"{source}: no such directory, and it could not be downloaded ({error}); where there "
            f"is no net, run `hf download {source} --local-dir DIR` elsewhere and name DIR"
        ) from error


def _tokenizer(directory: pathlib.Path, family: Family, traits: Traits) -> HubTokenizer | None:
    if not has_tokenizer(directory):
        return None
    adapted = family.name.startswith("a2d")
    try:
        codec = HubTokenizer.read(
            directory,
            vocab_size=traits.vocab_size,
            mask_token=MASK_TOKEN if adapted or traits.attention == "causal" else None,
            chat_options=_chat_options(family),
        )
    except ValueError as error:
        raise ValueError(f"{error}. To load the model without: tokenizer=False") from error
    if codec.vocab_size > traits.vocab_size:
        warnings.warn(
            f"{directory}: the tokenizer has {codec.num_tokens} tokens (mask token {codec.mask_id}"
            f"), the model {traits.vocab_size} rows; hub.with_mask_row adds the others",
            stacklevel=3,
        )
    return codec


def _chat_options(family: Family) -> dict[str, Any]:
    """As dllm prompts Qwen; templates that do not know it ignore it."""
    return {"enable_thinking": False} if family.name.startswith("a2d-qwen") else {}


def _stored(tensors: files.TensorFiles, family: Family) -> Stored:
    path, dtypes = tensors.directory / files.NOTES, tensors.dtypes
    if path.is_file():
        dtypes = files.read_json(path).get("dtypes")
        if not dtypes or not all(name in files.FLOATS for name in dtypes.values()):
            raise ValueError(f"{path}: needs dtypes, tensor name to one of {files.FLOATS}")
    names = (name for name in tensors.shapes if re.fullmatch(family.ignored, name))
    return Stored(dtypes, {name: tensors.read(name) for name in names})


def _buffers(stored: Stored) -> dict[str, files.Tensor]:
    return {
        name: files.Tensor(value.shape, value.dtype.name, lambda value=value: value)
        for name, value in stored.buffers.items()
    }


def _most_common(dtypes: Mapping[str, str]) -> str:
    """The dtype of most weights; buffers may have another."""
    return collections.Counter(dtypes.values()).most_common(1)[0][0]


def _dtype(name: str | np.dtype, setting: str) -> np.dtype:
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in files.FLOATS:
        raise ValueError(f"{setting} must be one of {', '.join(files.FLOATS)}, got {name!r}")
    return dtype
