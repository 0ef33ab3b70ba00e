"""What a family of models is, and which one a config.json belongs to."""

import dataclasses
import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from mdm_jax.hub.files import TensorFiles
from mdm_jax.hub.leaves import Leaf
from mdm_jax.types import Array


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
        logits: ``(model, params, traits, input_ids [N, L], attention_mask [N, L] | None, ...)`` ->
            [N, L, K] float32, those of the original class, before any shift.
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
    logits: Callable[..., Array]
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
