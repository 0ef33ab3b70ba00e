"""The yardstick of the benchmarks: masked diffusion in plain JAX, as a short script would have it.

The model of ``mdm_jax.models.Transformer`` with its defaults, on the same parameters: einsum
attention, everything float32, logits of all positions, AdamW. No average of the parameters, no
clipping of gradients, no documents, one noise level per row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mdm_jax.types import Array, PyTree


class PlainState(NamedTuple):
    """Parameters, optimiser state and the number of steps done."""

    params: PyTree
    opt_state: PyTree
    step: Array


def logits(params: PyTree, tokens: Array, num_heads: int) -> Array:
    """[N, L, K] of tokens [N, L]; ``params`` are those of ``models.Transformer``, unboxed."""
    tree = params["params"]
    x = tree["embedding"][tokens]
    depth = sum(name.startswith("block_") for name in tree)
    for i in range(depth):
        block = tree[f"block_{i}"]
        x = x + _attention(block["attention"], _norm(block["norm_1"], x), num_heads)
        h = _norm(block["norm_2"], x) @ block["mlp"]["up"]["kernel"]
        x = x + jax.nn.gelu(h) @ block["mlp"]["down"]["kernel"]
    return _norm(tree["norm"], x) @ tree["head"]["kernel"]


def loss(
    params: PyTree, tokens: Array, rate: Array, noise: Array, mask_id: int, num_heads: int
) -> Array:
    """The bound with fixed counts, nats per token.

    Args:
        params: of the network.
        tokens: [B, L] clean tokens.
        rate: [B] masking rates; row i masks ``1 + floor(L rate_i)`` tokens, of lowest noise.
        noise: [B, L] uniforms.
        mask_id: the mask token, the last of the vocabulary.
        num_heads: attention heads.
    """
    length = tokens.shape[-1]
    count = jnp.clip(1 + jnp.floor(length * rate), 1, length)[:, None]
    rank = jnp.argsort(jnp.argsort(noise, axis=-1), axis=-1)
    masked = rank < count
    out = logits(params, jnp.where(masked, mask_id, tokens), num_heads)
    log_probs = jax.nn.log_softmax(_without_mask(out, mask_id), axis=-1)
    nats = -jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
    return jnp.mean(jnp.where(masked, nats, 0.0) * length / count)


def make_step(
    mask_id: int, num_heads: int, learning_rate: float = 1e-3, seed: int = 0
) -> tuple[Callable[[PyTree], PlainState], Callable[[PlainState, Array], Any]]:
    """``init(params) -> state`` and ``step(state, tokens) -> (state, loss)``, to be jitted."""
    optimizer = optax.adamw(learning_rate)

    def init(params: PyTree) -> PlainState:
        return PlainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    def step(state: PlainState, tokens: Array) -> tuple[PlainState, Array]:
        first, second = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        rows = tokens.shape[0]
        rate = (jnp.arange(rows) + jax.random.uniform(first, (rows,))) / rows
        noise = jax.random.uniform(second, tokens.shape)
        value, gradients = jax.value_and_grad(loss)(
            state.params, tokens, rate, noise, mask_id, num_heads
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return PlainState(params, opt_state, state.step + 1), value

    return init, step


def make_sampler(
    mask_id: int, num_heads: int, num_steps: int, num_run: int | None = None
) -> Callable[..., Array]:
    """``generate(params, key, canvas [B, L]) -> tokens [B, L]``: ancestral, uniform rates.

    All steps do the same work; with ``num_run`` only so many of them are run, to time those.
    """

    @jax.jit
    def generate(params: PyTree, key: Array, canvas: Array) -> Array:
        def step(i: Array, tokens: Array) -> Array:
            reveal_key, token_key = jax.random.split(jax.random.fold_in(key, i))
            out = logits(params, tokens, num_heads)
            drawn = jax.random.categorical(token_key, _without_mask(out, mask_id))
            # From the rate 1 - i / N to the next: the last step reveals whatever is left.
            reveal = jax.random.uniform(reveal_key, tokens.shape) < 1 / (num_steps - i)
            return jnp.where((tokens == mask_id) & reveal, drawn, tokens)

        return jax.lax.fori_loop(0, num_steps if num_run is None else num_run, step, canvas)

    return generate


def _without_mask(out: Array, mask_id: int) -> Array:
    return jnp.where(jnp.arange(out.shape[-1]) == mask_id, -1e30, out)


def _norm(params: PyTree, x: Array) -> Array:
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
    return x * scale * params["scale"]


def _attention(params: PyTree, x: Array, num_heads: int) -> Array:
    rows, length, width = x.shape
    q, k, v = (
        (x @ params[name]["kernel"]).reshape(rows, length, num_heads, -1)
        for name in ("query", "key", "value")
    )
    scores = jnp.einsum("nqhd,nkhd->nhqk", _rotate(q), _rotate(k)) * q.shape[-1] ** -0.5
    y = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores, axis=-1), v)
    return y.reshape(rows, length, width) @ params["out"]["kernel"]


def _rotate(x: Array) -> Array:
    length, half = x.shape[1], x.shape[-1] // 2
    frequency = 10_000.0 ** (-jnp.arange(half) / half)
    angle = (jnp.arange(length)[:, None] * frequency[None])[None, :, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate(
        [a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], axis=-1
    )
