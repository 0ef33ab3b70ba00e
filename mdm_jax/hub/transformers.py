"""Families whose body is :class:`mdm_jax.models.Transformer`.

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


def logits(
    model: Transformer,
    params: PyTree,
    traits: Traits,
    input_ids: Array,
    attention_mask: Array | None,
    positions: Array | None = None,
    noised: Array | None = None,
) -> Array:
    """[N, L, K] of the family's own attention; padded keys are not attended to.

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
        positions = np.concatenate([positions, positions], axis=-1)
        documents = None if documents is None else jnp.concatenate([documents, documents], axis=-1)
        pattern: masks.Pattern = masks.BlockTraining(length, traits.block_size or size)
    elif size < length:
        pattern = masks.BlockCausal(length, size)
    else:
        pattern = masks.Full((length, length))
    rule: masks.Rule | Array = masks.Rule(pattern, documents)
    if length % size:  # the last block is cut: no implementation but the dense one
        rule = rule.dense()
    options = {"method": "attend", "num_outputs": length}
    return model.apply(params, input_ids, None, positions, rule, **options)[0]


def _read_llama(
    raw: Mapping[str, Any], *, qk_norm: bool, qkv_bias: bool, attention: str, shift: bool = False
) -> tuple[TransformerConfig, Traits]:
    """Config and traits of the layout of Llama, Qwen2, Qwen3, Dream and SDAR."""
    refuse(
        raw,
        hidden_act="silu",
        attention_bias=qkv_bias,
        mlp_bias=False,
        pretraining_tp=1,
        attention_multiplier=1.0,
        logits_scaling=1.0,
        final_logit_softcapping=0.0,
        partial_rotary_factor=(1, 1.0),
    )
    if attention == "causal" and raw.get("use_sliding_window", True):
        refuse(raw, sliding_window=())
    config = TransformerConfig(
        vocab_size=field(raw, "vocab_size"),
        width=field(raw, "hidden_size"),
        depth=field(raw, "num_hidden_layers"),
        num_heads=field(raw, "num_attention_heads"),
        num_kv_heads=field(raw, "num_key_value_heads", default=field(raw, "num_attention_heads")),
        head_dim=field(
            raw,
            "head_dim",
            default=field(raw, "hidden_size") // field(raw, "num_attention_heads"),
        ),
        mlp="swiglu",
        mlp_hidden=field(raw, "intermediate_size"),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        norm_eps=field(raw, "rms_norm_eps", float),
        norm_rounded=True,
        rope_base=field(raw, "rope_theta", float),
        rope_scaling=_rope_scaling(raw),
        tie_embeddings=field(raw, "tie_word_embeddings", bool, default=False),
    )
    return config, _traits(raw, config, attention=attention, shift=shift)


def _traits(raw: Mapping[str, Any], config: TransformerConfig, **more: Any) -> Traits:
    ids = {
        name: field(raw, f"{name.removesuffix('_id')}_token_id", default=None)
        for name in ("mask_id", "pad_id", "bos_id")
    }
    eos = raw.get("eos_token_id")
    ids["eos_id"] = eos[0] if isinstance(eos, list) and eos else eos
    length = raw.get("max_position_embeddings", raw.get("max_sequence_length"))
    return Traits(vocab_size=config.vocab_size, length=length, **ids, **more)


def _rope_scaling(raw: Mapping[str, Any]) -> Llama3Scaling | None:
    scaling = raw.get("rope_scaling")
    if scaling is None:
        return None
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise Unsupported(
            f"config.json: rope_scaling of type {kind!r} changes the numbers and is not supported; "
            "only null or 'llama3'"
        )
    return Llama3Scaling(
        factor=field(scaling, "factor", float),
        low=field(scaling, "low_freq_factor", float),
        high=field(scaling, "high_freq_factor", float),
        original=field(scaling, "original_max_position_embeddings"),
    )


def _read_sdar(raw: Mapping[str, Any]) -> tuple[TransformerConfig, Traits]:
    config, traits = _read_llama(raw, qk_norm=True, qkv_bias=False, attention="block")
    config = dataclasses.replace(config, norm_rounded=False)
    return config, dataclasses.replace(traits, block_size=field(raw, "block_size"))


def _read_llada(raw: Mapping[str, Any]) -> tuple[TransformerConfig, Traits]:
    # The defaults of the class are not those of the released models, so nothing may be missing.
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
        rope=True,
        rope_full_precision=True,
        multi_query_attention=(False,),
    )
    for name in ("rope", "block_type", "layer_norm_type", "weight_tying", "activation_type"):
        field(raw, name, (bool, str)[name in ("block_type", "layer_norm_type", "activation_type")])
    heads = field(raw, "n_heads")
    config = TransformerConfig(
        vocab_size=field(raw, "embedding_size", default=field(raw, "vocab_size")),
        width=field(raw, "d_model"),
        depth=field(raw, "n_layers"),
        num_heads=heads,
        num_kv_heads=field(raw, "n_kv_heads", default=heads),
        mlp="swiglu",
        mlp_hidden=field(raw, "mlp_hidden_size"),
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
        mlp_hidden=field(raw, "dense_intermediate_size", default=8),
        qk_norm=field(raw, "qk_layernorm", bool, default=False),
        norm_eps=field(raw, "rms_norm_eps", float),
        norm_rounded=True,
        rope_base=field(raw, "rope_theta", float),
        rope_share=field(raw, "partial_rotary_factor", float),
        tie_embeddings=field(raw, "tie_word_embeddings", bool, default=False),
        experts=experts,
    )
    return config, _traits(raw, config)


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
        logits=logits,
        # A tied head may be stored nevertheless; rotary frequencies are recomputed.
        ignored=r".*rotary_emb\.inv_freq",
    )


_QWEN3 = {"qk_norm": True, "qkv_bias": False}
_QWEN2 = {"qk_norm": False, "qkv_bias": True}
_PLAIN = {"qk_norm": False, "qkv_bias": False}
_BOTH_WAYS, _CAUSAL = {"attention": "bidirectional"}, {"attention": "causal"}

FAMILIES: tuple[Family, ...] = (
    _family("a2d-qwen3", "A2DQwen3LMHeadModel", _read_llama, **_QWEN3, **_BOTH_WAYS),
    _family("a2d-qwen2", "A2DQwen2LMHeadModel", _read_llama, **_QWEN2, **_BOTH_WAYS),
    _family("a2d-llama", "A2DLlamaLMHeadModel", _read_llama, **_PLAIN, **_BOTH_WAYS),
    _family("qwen3", "Qwen3ForCausalLM", _read_llama, **_QWEN3, **_CAUSAL),
    _family("qwen2", "Qwen2ForCausalLM", _read_llama, **_QWEN2, **_CAUSAL),
    _family("llama", "LlamaForCausalLM", _read_llama, **_PLAIN, **_CAUSAL),
    _family("mistral", "MistralForCausalLM", _read_llama, **_PLAIN, **_CAUSAL),
    _family("dream", "DreamModel", _read_llama, **_QWEN2, **_BOTH_WAYS, shift=True),
    _family("sdar", "SDARForCausalLM", _read_sdar),
    _family("llada", "LLaDAModelLM", _read_llada, _LLADA),
    _family("llada-moe", "LLaDAMoEModelLM", _read_llada_moe),
)
