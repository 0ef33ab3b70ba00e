"""What a family of models is, and which one a config.json belongs to."""

import dataclasses
import difflib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax import sharding
from mdm_jax.hub.files import TensorFiles
from mdm_jax.hub.leaves import Leaf
from mdm_jax.models.cross_entropy import Readout
from mdm_jax.types import Array, PyTree


class Unsupported(ValueError):
    """A model or a setting that would not be computed as its own class does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
    """How a model is used.

    Attributes:
        vocab_size: K, width of the logits; the tokenizer may know fewer.
        mask_id, eos_id, pad_id, bos_id: token ids, None where no file says.
        attention: "bidirectional", "causal", or "block" of ``block_size``.
        shift: logits at i - 1 predict token i; position 0 keeps its own.
        time_conditioning: the noise level is an input.
        clip: the range of masking rates it was trained on, (low, high); None: all.
        length: longest row; None: not stated.
    """

    vocab_size: int
    mask_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    bos_id: int | None = None
    attention: str = "bidirectional"
    block_size: int | None = None
    shift: bool = False
    time_conditioning: bool = False
    clip: tuple[float, float] | None = None
    length: int | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """Models of one layout.

    Attributes:
        name: as in "a2d-qwen3".
        architectures: class names of config.json.
        read_config: config.json -> config of the module, traits; :class:`Unsupported` names a field
            that would change the numbers.
        model: config -> linen module.
        leaves: config -> parameter arrays and the tensors they are made of.
        outputs: ``(model, params, traits, input_ids [N, L], attention_mask [N, L] | None, ...)`` ->
            a ``models.Readout`` of the original class's logits [N, L, K], before any shift, or
            these float32 logits.
        example: inputs of the module, by which its parameters get their shapes.
        ignored: pattern of file tensors that are no parameters (buffers); kept on saving.
        copies: config -> tensors that a file may hold though they equal another, and that one (a
            tied head); written back where they were.
        read_buffers: traits of config.json, files -> traits that buffers state.
    """

    name: str
    architectures: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any]], tuple[Any, Traits]]
    model: Callable[[Any], nn.Module]
    leaves: Callable[[Any], tuple[Leaf, ...]]
    outputs: Callable[..., Readout | Array]
    ignored: str = ""
    example: tuple[Any, ...] = (np.zeros((1, 8), np.int32),)
    copies: Callable[[Any], Mapping[str, str]] = lambda _: {}
    read_buffers: Callable[[Traits, TensorFiles], Traits] = lambda traits, _: traits


def find_family(raw: Mapping[str, Any], origin: str, families: Iterable[Family]) -> Family:
    """The family of a config.json by its architecture; Unsupported, with near names, if none."""
    known = {name: family for family in families for name in family.architectures}
    given = raw.get("architectures")
    if not isinstance(given, list) or not given or not all(isinstance(n, str) for n in given):
        raise Unsupported(
            f"{origin}: needs the field architectures, a list with the name of a class; supported "
            f"are {', '.join(sorted(known))}"
        )
    for name in given:
        if name in known:
            return known[name]
    near = difflib.get_close_matches(given[0], known, 3, 0.5)
    raise Unsupported(
        f"{origin}: architecture {given[0]} (model_type {raw.get('model_type')}) is not supported; "
        + (f"nearest: {', '.join(near)}; " if near else "")
        + f"supported are {', '.join(sorted(known))}"
    )


def field(raw: Mapping[str, Any], name: str, kind: type = int, **default: Any) -> Any:
    """A field of config.json of some kind; ``default=`` where it may be missing or null."""
    value = raw.get(name)
    if value is None:
        if "default" in default:
            return default["default"]
        raise Unsupported(f"config.json: needs {name}")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise Unsupported(f"config.json: {name} must be {kind.__name__}, got {value!r}")
    return value


def refuse(raw: Mapping[str, Any], **allowed: Any) -> None:
    """Raise Unsupported for a field that is present with another value than the allowed ones.

    ``name=value`` or ``name=(value, ...)``; null and missing are allowed too.
    """
    for name, values in allowed.items():
        values = values if isinstance(values, tuple) else (values,)
        value = raw.get(name)
        if value is not None and value not in values:
            raise Unsupported(
                f"config.json: {name}={value!r} changes the numbers and is not supported; only "
                f"{' or '.join(map(json.dumps, values)) or 'null'}"
            )


def abstract_params(family: Family, model: nn.Module, mesh: jax.sharding.Mesh | None) -> PyTree:
    """Shapes, dtypes and shardings of the parameters, which are not computed.

    ValueError if the mesh's tensor axis would cut through heads; warnings for what it leaves whole.
    """

    boxes = _traced(family, model.config)

    def init() -> PyTree:  # in place of the module's own, which takes a second to trace
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), boxes)

    if mesh is not None:
        sharding.check_num_heads(mesh, model.config.num_heads)
        kv_heads = getattr(model.config, "kv_heads", model.config.num_heads)
        messages = sharding.kept_whole(init, mesh)
        if kv_heads % mesh.shape["tensor"]:
            messages.append(
                f"{kv_heads} key-value heads do not divide by tensor={mesh.shape['tensor']}: keys "
                "and values are whole on every device"
            )
        for message in messages:
            warnings.warn(message, stacklevel=3)
        return sharding.abstract_sharded(init, mesh)
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def abstract(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(abstract, nn.meta.unbox(boxes))


def _traced(family: Family, config: Any) -> PyTree:
    """Shapes of the parameters with their logical axes; blocks that are alike are traced once."""

    def trace(config: Any) -> PyTree:
        model = family.model(config)
        return jax.eval_shape(lambda: model.init(jax.random.key(0), *family.example))

    experts = getattr(config, "experts", None)
    alike = experts is None or all(map(experts.at, range(config.depth)))
    if config.scan_layers or not alike:
        return trace(config)
    params = dict(trace(dataclasses.replace(config, scan_layers=True))["params"])

    def first(box: nn.LogicallyPartitioned) -> nn.LogicallyPartitioned:
        leaf = jax.ShapeDtypeStruct(box.value.shape[1:], box.value.dtype)
        return box.replace(value=leaf, names=box.names[1:])

    blocks = params.pop("blocks")["block"]
    block = jax.tree.map(first, blocks, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))
    return {"params": params | {f"block_{i}": block for i in range(config.depth)}}
