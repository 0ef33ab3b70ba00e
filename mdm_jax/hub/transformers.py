"""Families whose body is :class:`~mdm_jax.models.transformer.Transformer`.

A2D (bidirectional Qwen3, Qwen2, Llama) and the causal models that they come from, LLaDA, Dream,
LLaDA-MoE, SDAR. Fields of config.json are those of the original classes; one that would change the
numbers and is not computed here is refused by name.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mdm_jax.hub.family import Family, Traits, Unsupported, field, refuse
from mdm_jax.hub.leaves import Leaf, leaf
from mdm_jax.models import masks
from mdm_jax.models.cross_entropy import Readout
from mdm_jax.models.layers import Llama3Scaling
from mdm_jax.models.moe import Experts
from mdm_jax.models.transformer import Transformer, TransformerConfig
from mdm_jax.types import Array, PyTree

_LLAMA = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "block": "model.layers.{}.",
    "norm_1": "input_layernorm.weight",
    "norm_2": "post_attention_layernorm.weight",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "query_norm": "self_attn.q_norm.weight",
    "key_norm": "self_attn.k_norm.weight",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "router": "mlp.gate.weight",
    "router_bias": "mlp.expert_bias",
    "experts": "mlp.experts.{}.{}_proj.weight",
    "shared": "shared_expert.{}_proj",
}
_LLADA = {
    "embedding": "model.transformer.wte.weight",
    "norm": "model.transformer.ln_f.weight",
    "head": "model.transformer.ff_out.weight",
    "block": "model.transformer.blocks.{}.",
    "norm_1": "attn_norm.weight",
    "norm_2": "ff_norm.weight",
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "out": "attn_out",
    "query_norm": "q_norm.weight",
    "key_norm": "k_norm.weight",
    "gate": "ff_proj",
    "up": "up_proj",
    "down": "ff_out",
}


def parameter_leaves(c: TransformerConfig, names: Mapping[str, str]) -> tuple[Leaf, ...]:
    """Parameter arrays of a transformer and their tensors, by the family's ``names``."""
    leaves = [leaf("embedding", names["embedding"]), leaf("norm/scale", names["norm"])]
    if not c.tie_embeddings:
        leaves.append(leaf("head/kernel", names["head"], transpose=True))
    blocks = [["blocks/block/{}", range(c.depth)]] if c.scan_layers else []
    blocks = blocks or [[f"block_{i}/{{}}", i] for i in range(c.depth)]
    for ours, numbers in blocks:

        def add(path: str, name: str, transpose: bool = False, ours=ours, numbers=numbers) -> None:
            if isinstance(numbers, int):
                sources: Any = names["block"].format(numbers) + name
            else:
                sources = [names["block"].format(i) + name for i in numbers]
            leaves.append(leaf(ours.format(path), sources, transpose))

        def add_experts(path: str, part: str, ours=ours, numbers=numbers) -> None:
            def row(i: int) -> list[str]:
                block = names["block"].format(i)
                return [block + names["experts"].format(j, part) for j in range(c.experts.count)]

            sources = row(numbers) if isinstance(numbers, int) else [row(i) for i in numbers]
            leaves.append(leaf(ours.format(path), sources, transpose=True))

        for name in ("norm_1", "norm_2"):
            add(f"{name}/scale", names[name])
        for name in ("query", "key", "value", "out"):
            add(f"attention/{name}/kernel", f"{names[name]}.weight", True)
        for name in ("query", "key", "value") if c.qkv_bias else ():
            add(f"attention/{name}_bias/bias", f"{names[name]}.bias")
        for name in ("query_norm", "key_norm") if c.qk_norm else ():
            add(f"attention/{name}/scale", names[name])
        first = numbers if isinstance(numbers, int) else 0
        if c.experts is None or not c.experts.at(first):
            for name in ("gate", "up", "down"):
                add(f"mlp/{name}/kernel", f"{names[name]}.weight", True)
            continue
        add("mlp/experts/router", names["router"], True)
        if c.experts.bias:
            add("mlp/experts/router_bias", names["router_bias"])
        for name in ("gate", "up", "down"):
            add_experts(f"mlp/experts/{name}", name)
            if c.experts.shared_hidden:
                add(f"mlp/shared/{name}/kernel", names["shared"].format(name) + ".weight", True)
    return tuple(leaves)


def readout(
    model: Transformer,
    params: PyTree,
    traits: Traits,
    input_ids: Array,
    attention_mask: Array | None,
    positions: Array | None = None,
    noised: Array | None = None,
) -> Readout:
    """Logits [N, L, K] by the family's own attention; padded keys are not attended to.

    ``positions`` [L] or [N, L] are 0, 1, ... if None. ``noised`` [N, L] gives the training forward
    of block models instead: logits of noised rows over clean ``input_ids``, by blocks of
    ``traits.block_size``.
    """
    length = input_ids.shape[-1]
    documents = None if attention_mask is None else attention_mask.astype(jnp.int32)
    if positions is None:
        positions = np.arange(length)
    size = {"bidirectional": length, "causal": 1, "block": traits.block_size}[traits.attention]
    if noised is not None:
        input_ids = jnp.concatenate([noised, input_ids], axis=-1)
        together = np if isinstance(positions, np.ndarray) else jnp
        positions = together.concatenate([positions, positions], axis=-1)
        documents = None if documents is None else jnp.concatenate([documents, documents], axis=-1)
        pattern: masks.Pattern = masks.BlockTraining(length, traits.block_size or size)
    elif size < length:
        pattern = masks.BlockCausal(length, size)
    else:
        pattern = masks.Full((length, length))
    rule: masks.Rule | Array = masks.Rule(pattern, documents)
    if length % size:  # the last block is cut: no implementation but the dense one
        rule = rule.dense()
    options = {"method": "attend_readout", "num_outputs": length}
    return model.apply(params, input_ids, None, positions, rule, **options)[0]


def _read_llama(
    raw: Mapping[str, Any],
    *,
    qk_norm: bool,
    qkv_bias: bool,
    attention: str,
    window: str | None = None,
    shift: bool = False,
) -> tuple[TransformerConfig, Traits]:
    """Config and traits of the layout of Llama, Qwen2, Qwen3, Dream and SDAR.

    ``window`` is the field by which the class has sliding windows, None if it has none.
    """
    refuse(raw, hidden_act="silu", mlp_bias=False, pretraining_tp=1, partial_rotary_factor=1.0)
    if not qkv_bias:  # the others' biases do not depend on it
        refuse(raw, attention_bias=False)
    if window == "use_sliding_window":
        refuse(raw, use_sliding_window=False)
    elif window is not None:
        refuse({window: "missing, which is 4096"} | raw, **{window: ()})
    if window is not None and {*(raw.get("layer_types") or ())} - {"full_attention"}:
        refuse(raw, layer_types=())
    width, heads = field(raw, "hidden_size"), field(raw, "num_attention_heads")
    # The class of Qwen3 has a default that does not follow from the width.
    head_dim = {} if qk_norm else {"default": width // max(heads, 1)}
    base, scaling = _rotary(raw)
    config = TransformerConfig(
        vocab_size=field(raw, "vocab_size"),
        width=width,
        depth=field(raw, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=field(raw, "num_key_value_heads", default=heads),
        head_dim=field(raw, "head_dim", **head_dim),
        mlp="swiglu",
        mlp_hidden=field(raw, "intermediate_size"),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        norm_eps=field(raw, "rms_norm_eps", float),
        norm_rounded=True,
        rope_base=base,
        rope_scaling=scaling,
        tie_embeddings=field(raw, "tie_word_embeddings", bool, default=False),
    )
    if attention == "bidirectional":
        shift = field(raw, "right_shift_logits", bool, default=shift)
    return config, _traits(raw, config, attention=attention, shift=shift)


def _traits(raw: Mapping[str, Any], config: TransformerConfig, **more: Any) -> Traits:
    eos = raw.get("eos_token_id")
    raw = {**raw, "eos_token_id": eos[0] if isinstance(eos, list) and eos else eos}
    ids = {
        f"{name}_id": field(raw, f"{name}_token_id", default=None)
        for name in ("mask", "eos", "pad", "bos")
    }
    mask_id = ids["mask_id"]
    if mask_id is not None and not 0 <= mask_id < config.vocab_size:
        raise Unsupported(
            f"config.json: mask_token_id {mask_id} is not one of {config.vocab_size} tokens"
        )
    length = field(
        raw, "max_position_embeddings", default=field(raw, "max_sequence_length", default=None)
    )
    return Traits(vocab_size=config.vocab_size, length=length, **ids, **more)


def _rotary(raw: Mapping[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """Base and scaling of the rotary embedding; releases since 5 write both as rope_parameters."""
    given = [field(raw, name, dict, default={}) for name in ("rope_parameters", "rope_scaling")]
    bases = [d["rope_theta"] for d in (raw, *given) if d.get("rope_theta") is not None]
    if any(base != bases[0] for base in bases) or (all(given) and given[0] != given[1]):
        raise Unsupported("config.json: rope_parameters contradict rope_theta or rope_scaling")
    base = field({"rope_theta": bases[0]} if bases else {}, "rope_theta", float)
    scaling = given[0] or given[1]
    kind = scaling.get("rope_type", scaling.get("type"))
    if not scaling or kind == "default":
        refuse(scaling, partial_rotary_factor=1.0)
        return base, None
    if kind != "llama3":
        raise Unsupported(
            f"config.json: rope_scaling of type {kind!r} changes the numbers and is not supported; "
            "only null, 'default' or 'llama3'"
        )
    scaled = Llama3Scaling(
        factor=field(scaling, "factor", float),
        low=field(scaling, "low_freq_factor", float),
        high=field(scaling, "high_freq_factor", float),
        original=field(scaling, "original_max_position_embeddings"),
    )
    if not (scaled.factor > 0 and 0 < scaled.low < scaled.high and scaled.original > 0):
        raise Unsupported(f"config.json: rope_scaling out of range: {dict(scaling)}")
    return base, scaled


def write_llama(c: TransformerConfig, name: str) -> dict[str, Any]:
    """Fields of config.json of a family by :func:`_read_llama`, for a transformer of our own."""
    raw = {
        "model_type": name,
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_size,
        "intermediate_size": c.hidden,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_base,
        "rope_scaling": None,
        "tie_word_embeddings": c.tie_embeddings,
        "attention_bias": c.qkv_bias,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "torch_dtype": np.dtype(c.param_dtype).name,
    }
    return raw | ({"use_sliding_window": False} if "qwen" in name else {"mlp_bias": False})


def _read_sdar(raw: Mapping[str, Any], **settings: Any) -> tuple[TransformerConfig, Traits]:
    config, traits = _read_llama(raw, attention="block", **settings)
    size = field(raw, "block_size")
    if size < 1:
        raise Unsupported(f"config.json: block_size must be at least 1, got {size}")
    config = dataclasses.replace(config, norm_rounded=False)
    return config, dataclasses.replace(traits, block_size=size)


def _read_llada(raw: Mapping[str, Any]) -> tuple[TransformerConfig, Traits]:
    refuse(
        raw,
        alibi=False,
        activation_type="silu",
        block_type="llama",
        layer_norm_type="rms",
        layer_norm_with_affine=True,
        attention_layer_norm_with_affine=True,
        bias_for_layer_norm=False,
        include_bias=False,
        input_emb_norm=False,
        scale_logits=False,
        block_group_size=1,
        clip_qkv=(),
        rope=True,
        rope_full_precision=True,
        multi_query_attention=False,
    )
    # Defaults of the class are not those of the released models, so these may not be missing.
    for name in ("activation_type", "block_type", "layer_norm_type"):
        field(raw, name, str)
    field(raw, "rope", bool)
    width, heads = field(raw, "d_model"), field(raw, "n_heads")
    config = TransformerConfig(
        vocab_size=field(raw, "embedding_size", default=field(raw, "vocab_size")),
        width=width,
        depth=field(raw, "n_layers"),
        num_heads=heads,
        num_kv_heads=field(raw, "n_kv_heads", default=heads),
        mlp="swiglu",
        mlp_hidden=field(
            raw, "mlp_hidden_size", default=field(raw, "mlp_ratio", default=0) * width
        ),
        qkv_bias=field(raw, "include_qkv_bias", bool, default=False),
        qk_norm=field(raw, "attention_layer_norm", bool, default=False),
        qk_norm_over="width",
        norm_eps=field(raw, "rms_norm_eps", float),
        norm_rounded=True,
        rope_base=field(raw, "rope_theta", float),
        tie_embeddings=field(raw, "weight_tying", bool),
    )
    return config, _traits(raw, config)


def _read_llada_moe(raw: Mapping[str, Any]) -> tuple[TransformerConfig, Traits]:
    refuse(raw, hidden_act="silu", attention_bias=False, clip_qkv=(), rope_scaling=())
    depth, heads = field(raw, "num_hidden_layers"), field(raw, "num_attention_heads")
    mixed = field(raw, "moe_layer_freq", list, default=[1] * depth)
    if len(mixed) != depth or not all(kind in (0, 1) for kind in mixed):
        raise Unsupported(
            f"config.json: moe_layer_freq must hold 0 (dense) or 1 for each of {depth} layers, got "
            f"{mixed}"
        )
    experts = Experts(
        count=field(raw, "num_experts"),
        per_token=field(raw, "num_experts_per_tok"),
        hidden=field(raw, "expert_intermediate_size"),
        shared_hidden=field(raw, "shared_expert_intermediate_size", default=0),
        layers=None if all(mixed) else tuple(i for i, kind in enumerate(mixed) if kind),
        bias=field(raw, "moe_router_enable_expert_bias", bool, default=False),
    )
    config = TransformerConfig(
        vocab_size=field(raw, "vocab_size"),
        width=field(raw, "hidden_size"),
        depth=depth,
        num_heads=heads,
        num_kv_heads=field(raw, "num_key_value_heads", default=heads),
        mlp="swiglu",
        mlp_hidden=field(raw, "dense_intermediate_size", default=0),
        qk_norm=field(raw, "qk_layernorm", bool, default=False),
        norm_eps=field(raw, "rms_norm_eps", float),
        norm_rounded=True,
        rope_base=field(raw, "rope_theta", float),
        rope_share=field(raw, "partial_rotary_factor", float),
        tie_embeddings=field(raw, "tie_word_embeddings", bool, default=False),
        experts=experts,
    )
    return config, _traits(raw, config)


def _tied_head(c: TransformerConfig, names: Mapping[str, str]) -> dict[str, str]:
    return {names["head"]: names["embedding"]} if c.tie_embeddings else {}


def _family(
    name: str,
    architecture: str,
    read: Callable[..., tuple[TransformerConfig, Traits]],
    names: Mapping[str, str] = _LLAMA,
    **settings: Any,
) -> Family:
    return Family(
        name=name,
        architectures=(architecture,),
        read_config=functools.partial(read, **settings),
        model=Transformer,
        leaves=functools.partial(parameter_leaves, names=names),
        outputs=readout,
        ignored=r".*rotary_emb\.inv_freq",  # recomputed
        copies=functools.partial(_tied_head, names=names),
    )


_WINDOW = {"window": "use_sliding_window"}
_QWEN3, _QWEN2, _PLAIN = (
    {"qk_norm": qk_norm, "qkv_bias": qkv_bias}
    for qk_norm, qkv_bias in ((True, False), (False, True), (False, False))
)
_BOTH_WAYS, _CAUSAL = {"attention": "bidirectional"}, {"attention": "causal"}

FAMILIES: tuple[Family, ...] = (
    _family("a2d-qwen3", "A2DQwen3LMHeadModel", _read_llama, **_QWEN3, **_BOTH_WAYS),
    _family("a2d-qwen2", "A2DQwen2LMHeadModel", _read_llama, **_QWEN2, **_BOTH_WAYS),
    _family("a2d-llama", "A2DLlamaLMHeadModel", _read_llama, **_PLAIN, **_BOTH_WAYS),
    _family("qwen3", "Qwen3ForCausalLM", _read_llama, **_QWEN3, **_CAUSAL, **_WINDOW),
    _family("qwen2", "Qwen2ForCausalLM", _read_llama, **_QWEN2, **_CAUSAL, **_WINDOW),
    _family("llama", "LlamaForCausalLM", _read_llama, **_PLAIN, **_CAUSAL),
    _family(
        "mistral",
        "MistralForCausalLM",
        _read_llama,
        **_PLAIN,
        **_CAUSAL,
        window="sliding_window",
    ),
    _family("dream", "DreamModel", _read_llama, **_QWEN2, **_BOTH_WAYS, **_WINDOW, shift=True),
    _family("sdar", "SDARForCausalLM", _read_sdar, **_QWEN3, **_WINDOW),
    _family("llada", "LLaDAModelLM", _read_llada, _LLADA),
    _family("llada-moe", "LLaDAMoEModelLM", _read_llada_moe),
)
