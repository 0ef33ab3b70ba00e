"""The likelihood of an answer as LLaDA's evaluation estimates it."""

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.hub.decoding import shifted
from mdm_jax.hub.model import HubModel
from mdm_jax.hub.rules import RULES, check_rule
from mdm_jax.rng import stream
from mdm_jax.samplers.sampler import row_keys
from mdm_jax.types import Array, ArrayLike


def log_likelihood(
    model: HubModel,
    prompt: ArrayLike,
    answer: ArrayLike,
    *,
    key: Array,
    samples: int = 128,
    batch_size: int = 16,
    mask_id: int | None = None,
) -> float:
    """LLaDA's lower bound on the log-likelihood of an answer to a prompt, nats (its eval script).

    ``samples`` (a multiple of ``batch_size``) noised answers: the numbers of masks in a batch are
    even over 1 .. L from a random start (:func:`mask_numbers`), the places random.
    """
    prompt, answer = (np.asarray(part, np.int32).reshape(-1) for part in (prompt, answer))
    if samples % batch_size or len(answer) == 0:
        raise ValueError(
            f"samples must be a multiple of batch_size and the answer not empty, got "
            f"{samples}, {batch_size} and {len(answer)} tokens"
        )
    mask_id = model.traits.mask_id if mask_id is None else mask_id
    check_rule(model, RULES["llada"], mask_id)
    tokens, total = np.concatenate([prompt, answer]), 0.0
    for batch in range(samples // batch_size):
        first, order = (stream(jax.random.fold_in(key, batch), name) for name in ("count", "place"))
        start = int(jax.random.randint(first, (), 1, len(answer) + 1))
        numbers = mask_numbers(start, batch_size, len(answer))
        keys = row_keys(order, 0, batch_size)
        ranks = jax.vmap(lambda k: jax.random.permutation(k, len(answer)))(keys)
        noised = np.where(np.asarray(ranks) < numbers[:, None], mask_id, answer)
        noised = np.concatenate([np.tile(prompt, (batch_size, 1)), noised], axis=1)
        total += masked_score(model, tokens, noised, numbers / len(answer), mask_id) * batch_size
    return total / samples


def mask_numbers(start: int, batch_size: int, length: int) -> np.ndarray:
    """[batch_size] numbers of masks: even steps of ``length / batch_size`` from ``start``, wrapped
    into 1 .. ``length``."""
    end = start + (batch_size - 1) * (length / batch_size)
    return (np.round(np.linspace(start, end, batch_size)).astype(np.int64) - 1) % length + 1


def masked_score(
    model: HubModel, tokens: ArrayLike, noised: ArrayLike, rates: ArrayLike, mask_id: int
) -> float:
    """Mean over rows of ``sum_masked log p(token) / rate``, nats: tokens [L], noised [B, L],
    rates [B] or [B, L]."""
    noised, rates = np.asarray(noised), np.asarray(rates, np.float32)
    logits = model.logits(noised)
    logits = shifted(logits) if model.traits.shift else logits
    targets = jnp.broadcast_to(jnp.asarray(tokens), noised.shape)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    scores = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    weights = (noised == mask_id) / rates.reshape(len(noised), -1)
    return float(jnp.sum(scores * weights) / len(noised))
