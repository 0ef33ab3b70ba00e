"""Adapters in the layout of PEFT: adapter_config.json and adapter_model.safetensors.

PEFT has ``lora_A.weight`` [r, in] and ``lora_B.weight`` [out, r] below the path of the module in
the original class, behind ``base_model.model.``; ours are A [in, r] and B [r, out].
"""

import dataclasses
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from mdm_jax import distributed
from mdm_jax.hub import files, leaves
from mdm_jax.hub.family import Unsupported, field, refuse
from mdm_jax.hub.leaves import Leaf
from mdm_jax.hub.model import HubModel
from mdm_jax.models import lora
from mdm_jax.pytrees import TRAINED
from mdm_jax.types import PyTree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NULL = [
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "kasa_config",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "lora_ga_config",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "velora_config",
]
"""Fields of PEFT that are null in what is written."""
_PLAIN: dict[str, Any] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "use_dora": False,
    "use_qalora": False,
    "alpha_pattern": {},
    "rank_pattern": {},
    "loftq_config": {},
    "peft_type": "LORA",
}
"""Fields of PEFT that change what an adapter computes, and the values that are supported."""
_EITHER = ("exclude_modules", "layers_pattern", "layers_to_transform")
"""Null fields that only say which modules have adapters, as the tensors do."""


def projection_names(model: HubModel) -> dict[str, str]:
    """Names of the projections in the original class, as in "q_proj", and what they are here."""
    return {_last(leaf.sources.flat[0]): leaf.path[-2] for leaf in _projections(model)}


def read_spec(directory: str | os.PathLike, model: HubModel) -> lora.Lora:
    """What a directory's adapter_config.json and tensors describe, for that model.

    ValueError, naming file and field, for what is no LoRA of linear layers as it is computed here.
    """
    path = pathlib.Path(directory) / CONFIG
    raw = files.read_json(path)
    names = files.TensorFiles(directory, WEIGHTS).shapes
    try:
        refuse(raw, init_lora_weights=(True, False, "gaussian"), **_PLAIN)
        refuse(raw, **{name: () for name in _NULL if name not in _EITHER})
        return lora.Lora(
            rank=field(raw, "r"),
            alpha=field(raw, "lora_alpha", float),
            dropout=field(raw, "lora_dropout", float, default=0.0),
            rslora=field(raw, "use_rslora", bool, default=False),
            targets=tuple(
                sorted(
                    {
                        leaf.path[-2]
                        for leaf in _projections(model)
                        if any(_tensor(source, "A") in names for source in leaf.sources.flat)
                    }
                )
            ),
        )
    except Unsupported as error:
        raise ValueError(str(error).replace("config.json", str(path), 1)) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_adapters(
    directory: str | os.PathLike, model: HubModel, spec: lora.Lora, abstract: PyTree = None
) -> PyTree:
    """``{"adapters": ...}`` of a directory, for :func:`mdm_jax.models.lora.join` and ``merge``.

    ``abstract`` are their shapes, dtypes and shardings; None: float32 on one device. ValueError,
    naming file and tensor, for tensors missing, superfluous or of another shape, and settings that
    ``spec`` contradicts; the dropout is its own.
    """
    own, known = read_spec(directory, model), {leaf.path[-2] for leaf in _projections(model)}
    wrong = []
    for name in ("rank", "alpha", "rslora", "targets"):
        given, has = getattr(spec, name), getattr(own, name)
        if name == "targets":
            given = tuple(sorted(given or known))
        if given != has:
            shown = f'"{has}"' if isinstance(has, tuple) else has
            wrong.append(f"--config.adapter.{name}={shown}")
    if wrong:
        raise ValueError(f"{directory}: these adapters are of other settings: {' '.join(wrong)}")
    if abstract is None:
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(lambda leaf: leaf.update(sharding=place), _shapes(model, spec))
    tensors = files.TensorFiles(directory, WEIGHTS)
    try:
        found = leaves.load_params(tensors, _leaves(model, abstract), {"params": abstract[TRAINED]})
    except ValueError as error:
        raise ValueError(str(error).replace("config.json", CONFIG)) from error
    return {TRAINED: found["params"]}


def with_adapters(model: HubModel, directory: str | os.PathLike) -> HubModel:
    """A model with the adapters of a directory merged into its parameters (``lora.merge``)."""
    spec = read_spec(directory, model)
    adapters = load_adapters(directory, model, spec)
    return dataclasses.replace(model, params=lora.merge(model.params, adapters, spec))


def save_adapters(
    directory: str | os.PathLike,
    model: HubModel,
    adapters: PyTree,
    spec: lora.Lora,
    *,
    base: str | None = None,
    dtype: str | None = None,
) -> pathlib.Path:
    """Write adapters of a model to a new directory, for ``peft.PeftModel.from_pretrained``.

    ``base`` is the name of the model to put into it; ``dtype`` of the tensors, None: float32.
    ValueError if the directory exists and is not empty, or the original class has no linear layer
    of its own for a projection (as MDLM, which computes queries, keys and values in one).
    """
    directory = pathlib.Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory}: exists and is not empty; name a new directory")
    own = _leaves(model, adapters)
    tensors = leaves.tensors_of({"params": adapters[TRAINED]}, own)
    if dtype is not None:
        if dtype not in files.FLOATS:
            raise ValueError(f"dtype must be one of {', '.join(files.FLOATS)}, got {dtype!r}")
        tensors = {name: tensor._replace(dtype=dtype) for name, tensor in tensors.items()}
    if not distributed.is_first():
        files.write_file(directory / WEIGHTS, tensors)
        return directory
    record = dict.fromkeys(_NULL) | _PLAIN | {
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "ensure_weight_tying": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        "r": spec.rank,
        "revision": None,
        "target_modules": _target_modules(model, own),
        "task_type": None,
        "use_rslora": spec.rslora,
    }  # fmt: skip
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as made_in:
        target = pathlib.Path(made_in, "adapters")
        target.mkdir()
        files.write_file(target / WEIGHTS, dict(sorted(tensors.items())))
        text = json.dumps(dict(sorted(record.items())), indent=2, ensure_ascii=False)
        (target / CONFIG).write_text(text + "\n", "utf-8")
        target.replace(directory)
    return directory


def _projections(model: HubModel) -> list[Leaf]:
    """Kernels of linear layers that the original class has as such; not the output projection."""
    return [
        leaf
        for leaf in model.family.leaves(model.config)
        if leaf.path[-1] == "kernel" and leaf.path[0] != "head" and leaf.part is None
    ]


def _leaves(model: HubModel, adapters: PyTree) -> list[Leaf]:
    """A and B and their tensors."""
    projections = {leaf.path[:-1]: leaf for leaf in _projections(model)}
    found = []
    for path in traverse_util.flatten_dict(adapters[TRAINED]):
        leaf = projections.get(path[:-1])
        if leaf is None:
            raise ValueError(
                f"the class of {model.family.name} has no linear layer of its own for "
                f"{'/'.join(path[:-1])}, so PEFT cannot have its adapter; export the merged model"
            )
        named = [_tensor(source, path[-1].upper()) for source in leaf.sources.flat]
        sources = np.array(named, object).reshape(leaf.sources.shape)
        found.append(Leaf(path, sources, transpose=True))
    return found


def _shapes(model: HubModel, spec: lora.Lora) -> PyTree:
    def init(key: jax.Array) -> PyTree:
        return lora.init(key, nn.meta.unbox(model.model.init(key, *model.family.example)), spec)

    return jax.eval_shape(init, jax.random.key(0))


def _tensor(source: str, half: str) -> str:
    return f"base_model.model.{source.removesuffix('.weight')}.lora_{half}.weight"


def _last(source: str) -> str:
    return source.removesuffix(".weight").rpartition(".")[2]


def _target_modules(model: HubModel, adapted: Iterable[Leaf]) -> list[str] | str:
    """Last names of modules; a pattern of whole paths where other tensors end like them."""
    modules = [
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        for leaf in adapted
        if leaf.path[-1] == "a"
        for name in leaf.sources.flat
    ]
    names = sorted({name.rpartition(".")[2] for name in modules})
    every = (name for leaf in model.family.leaves(model.config) for name in leaf.sources.flat)
    if not any(
        _last(name) in names for name in every if name.removesuffix(".weight") not in modules
    ):
        return names
    patterns = {re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) for name in modules}
    return "|".join(sorted(patterns))
