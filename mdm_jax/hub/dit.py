"""Families whose body is :class:`~mdm_jax.models.dit.DiT`: MDLM, BD3-LM, and Duo and UDLM.

Their classes return logits of all ids. For MDLM and BD3-LM a mask token must be excluded and
positions that are not masked are known (SUBS, which is the objective's and the sampler's part
here); Duo's and UDLM's log-probabilities are a softmax over all ids.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.hub.family import Family, Traits, Unsupported, field, refuse
from mdm_jax.hub.files import TensorFiles
from mdm_jax.hub.leaves import Leaf, leaf
from mdm_jax.models import masks
from mdm_jax.models.cross_entropy import Readout
from mdm_jax.models.dit import DiT, DiTConfig
from mdm_jax.types import Array, PyTree

_BERT = {30522: 103, 28996: 103}
"""Vocabularies that have a mask token of their own; others got one behind their last id."""

_CLIP = ("sampling_eps_min", "sampling_eps_max")


def parameter_leaves(c: DiTConfig) -> tuple[Leaf, ...]:
    """Parameter arrays of a DiT and their tensors."""
    leaves = [
        leaf("embedding", "backbone.vocab_embed.embedding"),
        leaf("norm/scale", "backbone.output_layer.norm_final.weight"),
        leaf("head/kernel", "backbone.output_layer.linear.weight", transpose=True),
        leaf("head_bias", "backbone.output_layer.linear.bias"),
    ]

    def add_linear(path: str, names: Any) -> None:
        kernel, bias = (np.char.add(names, end).tolist() for end in (".weight", ".bias"))
        leaves.append(leaf(f"{path}/kernel", kernel, transpose=True))
        leaves.append(leaf(f"{path}/bias", bias))

    add_linear("level_1", "backbone.sigma_map.mlp.0")
    add_linear("level_2", "backbone.sigma_map.mlp.2")
    add_linear("modulation", "backbone.output_layer.adaLN_modulation")
    blocks: dict[str, Any] = {f"block_{i}": f"backbone.blocks.{i}." for i in range(c.depth)}
    if c.scan_layers:
        blocks = {"blocks/block": list(blocks.values())}
    for ours, theirs in blocks.items():

        def named(name: str, theirs=theirs) -> Any:
            return np.char.add(theirs, name).tolist()

        for i in (1, 2):
            leaves.append(leaf(f"{ours}/norm_{i}/scale", named(f"norm{i}.weight")))
        for i, name in enumerate(("query", "key", "value")):
            part = (i * c.width, (i + 1) * c.width)
            path = f"{ours}/attention/{name}/kernel"
            leaves.append(leaf(path, named("attn_qkv.weight"), True, part))
        leaves.append(leaf(f"{ours}/attention/out/kernel", named("attn_out.weight"), True))
        add_linear(f"{ours}/mlp/up", named("mlp.0"))
        add_linear(f"{ours}/mlp/down", named("mlp.2"))
        add_linear(f"{ours}/modulation", named("adaLN_modulation"))
    return tuple(leaves)


def readout(
    model: DiT,
    params: PyTree,
    traits: Traits,
    input_ids: Array,
    attention_mask: Array | None,
    timesteps: Array | None = None,
    sample_mode: bool = False,
    weights: Array | None = None,
) -> Readout:
    """Logits [N, L, K] of the original forward.

    Args:
        input_ids: [N, L] tokens. BD3-LM takes its training input, the noised row and the clean row
            side by side, [N, 2 length], and gives the logits of the noised one; in ``sample_mode``
            a row [N, L], whose blocks attend to themselves and those before. Duo takes [N, L, K]
            too, of which the softmax mixes embeddings.
        attention_mask: [N, L]; padded tokens are not attended to, which the original cannot do.
        timesteps: [N] or [] noise levels sigma = -log(survival probability); needed by models with
            time conditioning, not read by others.
        weights: [N, L, k] of tokens ``input_ids`` [N, L, k], for Duo.

    ValueError for missing timesteps, or a training input of another length.
    """
    if jnp.issubdtype(input_ids.dtype, jnp.floating):
        input_ids = jax.nn.softmax(input_ids.astype(jnp.float32), axis=-1)
    length = input_ids.shape[1]
    sigma = None
    if traits.time_conditioning:
        if timesteps is None:
            raise ValueError(
                "a model with time conditioning needs timesteps [N], its noise levels "
                "sigma = -log(survival probability)"
            )
        sigma = jnp.broadcast_to(jnp.asarray(timesteps, jnp.float32).reshape(-1), len(input_ids))
        sigma = sigma[:, None]
    documents = None if attention_mask is None else attention_mask.astype(jnp.int32)
    pattern: masks.Pattern = masks.Full((length, length))
    positions, outputs = np.arange(length), length
    if traits.attention == "block" and sample_mode:
        pattern = masks.BlockCausal(length, traits.block_size)
    elif traits.attention == "block":
        if length != 2 * traits.length:
            raise ValueError(
                f"BD3-LM's training input is a noised and a clean row of {traits.length} tokens "
                f"side by side, [N, {2 * traits.length}]; got {input_ids.shape}. For a row of at "
                "most that length give sample_mode=True"
            )
        pattern = masks.BlockTraining(traits.length, traits.block_size)
        positions, outputs = np.tile(np.arange(traits.length), 2), traits.length
    rule: masks.Rule | Array = masks.Rule(pattern, documents)
    if traits.block_size and outputs % traits.block_size:  # only the dense one can cut a block
        rule = rule.dense()
    options = {"sigma": sigma, "weights": weights, "num_outputs": outputs}
    inputs = (input_ids, None, positions, rule)
    return model.apply(params, *inputs, **options, method="attend_readout")[0]


def _read(raw: Mapping[str, Any], conditioned: bool | None) -> tuple[DiTConfig, Traits]:
    refuse(raw, causal=False, adaln=True, causal_attention=False, cfg=False)
    # The default of one class is a slip (129), and others are those of one size.
    config = DiTConfig(
        vocab_size=field(raw, "vocab_size"),
        width=field(raw, "hidden_dim"),
        depth=field(raw, "n_blocks"),
        num_heads=field(raw, "n_heads"),
        condition_width=field(raw, "cond_dim"),
        condition_on_logsnr=field(
            raw,
            "time_conditioning",
            bool,
            **{} if conditioned is None else {"default": conditioned},
        ),
    )
    traits = Traits(
        vocab_size=config.vocab_size,
        time_conditioning=config.condition_on_logsnr,
        length=field(raw, "model_length"),
    )
    return config, traits


def _read_mdlm(raw: Mapping[str, Any]) -> tuple[DiTConfig, Traits]:
    config, traits = _read(raw, None)
    mask_id = _BERT.get(config.vocab_size, config.vocab_size - 1)
    mask_id = field(raw, "mask_token_id", default=mask_id)
    return config, dataclasses.replace(traits, mask_id=mask_id)


def _read_bd3lm(raw: Mapping[str, Any]) -> tuple[DiTConfig, Traits]:
    config, traits = _read_mdlm(raw)
    # Without cross attention a row is one block, and there is no clean row.
    attention = "block" if field(raw, "cross_attn", bool) else "bidirectional"
    block_size = field(raw, "block_size") if attention == "block" else None
    if block_size is not None and not 1 <= block_size <= traits.length:
        raise Unsupported(
            f"config.json: block_size {block_size} is not one of 1 to {traits.length} tokens"
        )
    return config, dataclasses.replace(traits, attention=attention, block_size=block_size)


def _read_duo(raw: Mapping[str, Any]) -> tuple[DiTConfig, Traits]:
    return _read(raw, True)


def _read_clip(traits: Traits, tensors: TensorFiles) -> Traits:
    """The range of masking rates that a training has found, which buffers hold."""
    if not all(name in tensors.shapes for name in _CLIP):
        return traits
    # The shortest decimals of the file's dtype: 0.001, not 0.0010000000475.
    low, high = (float(str(tensors.read(name))) for name in _CLIP)
    if not 0 <= low < high <= 1:
        raise ValueError(f"{tensors.directory}: {_CLIP} must be a range in [0, 1], got {low, high}")
    return dataclasses.replace(traits, clip=(low, high))


_SHARED = {
    "model": DiT,
    "leaves": parameter_leaves,
    "outputs": readout,
    "ignored": rf"backbone\.rotary_emb\.inv_freq|{'|'.join(_CLIP)}",
    "read_buffers": _read_clip,
    "example": (np.zeros((1, 8), np.int32), np.zeros((1, 1), np.float32)),
}

FAMILIES: tuple[Family, ...] = (
    Family("mdlm", ("MDLM",), _read_mdlm, **_SHARED),
    Family("bd3lm", ("BD3LM",), _read_bd3lm, **_SHARED),
    Family("duo", ("DUO", "Duo"), _read_duo, **_SHARED),
    Family("udlm", ("UDLM",), _read_duo, **_SHARED),
)
