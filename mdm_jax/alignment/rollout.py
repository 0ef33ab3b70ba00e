"""Answers of the current policy to prompts, with the step in which each token was written."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.samplers.canvas import canvas_like
from mdm_jax.samplers.sampler import Sampler, sample_with_trace
from mdm_jax.samplers.wrappers import counted
from mdm_jax.types import Array, ArrayLike, Batch

if TYPE_CHECKING:
    from mdm_jax.data.tokenizers import Tokenizer


class Written(NamedTuple):
    """Sampled rows.

    Attributes:
        tokens: [B, L] int32.
        steps: [B, L] int32, numbered 0, 1, ... without gaps in a row; -1 for given tokens.
        passes: [B] int32, as of ``samplers.wrappers.counted``: steps until the row was finished.
    """

    tokens: Array
    steps: Array
    passes: Array


def make_rollout(
    apply_fn: Callable[..., Any], sampler: Sampler, grid: ArrayLike | None, *, mask_id: int
) -> Callable[..., Written]:
    """``rollout(params, key, canvas, documents=None, row_offset=0) -> Written``, compiled once.

    As ``samplers.make_generator``, which writes the same tokens; rows are independent and keyed by
    their number, and the loop ends when all are written.
    """

    def record(state: Any) -> tuple[Array, Array]:
        return state.tokens == mask_id, state.memory[1]

    @jax.jit
    def rollout(
        params: Any,
        key: Array,
        canvas: Array,
        documents: Array | None = None,
        row_offset: ArrayLike = 0,
    ) -> Written:
        def model_fn(*inputs: Array, **options: Any) -> Any:
            return apply_fn(params, *inputs, **options)

        tokens, (masked, passes) = sample_with_trace(
            key,
            model_fn,
            counted(sampler),
            grid,
            canvas,
            record,
            mask_id=mask_id,
            documents=documents,
            row_offset=row_offset,
        )
        # masked [N, B, L]: a token's step is the number of steps after which it was still masked.
        written = jnp.sum(masked, axis=0, dtype=jnp.int32)
        steps = number_steps(jnp.where(canvas == mask_id, written, -1))
        return Written(tokens, steps, passes[-1])

    return rollout


def without_steps(generate: Callable[..., Any], mask_id: int) -> Callable[..., Written]:
    """``rollout`` as of :func:`make_rollout` of a sampler that records no steps: all are 0.

    For scores that read none: bounds of answers. ``generate`` as of ``samplers.make_generator``,
    but that it returns tokens and each row's passes [B].
    """

    def rollout(
        params: Any,
        key: Array,
        canvas: Array,
        documents: Array | None = None,
        row_offset: ArrayLike = 0,
    ) -> Written:
        tokens, passes = generate(params, key, canvas, documents, row_offset)
        return Written(tokens, jnp.where(canvas == mask_id, 0, -1), passes)

    return rollout


def number_steps(steps: Array) -> Array:
    """Steps [B, L] numbered without gaps in each row, their order kept; -1 stays."""
    order = jnp.sort(steps, axis=-1)
    new = (order >= 0) & (order != jnp.concatenate([order[:, :1] * 0 - 1, order[:, :-1]], axis=-1))
    number = jnp.cumsum(new, axis=-1) - 1
    place = jax.vmap(jnp.searchsorted)(order, steps)
    return jnp.where(steps >= 0, jnp.take_along_axis(number, place, axis=-1), -1)


def prompts_to_answer(rows: Batch, answers: int, mask_id: int) -> Batch:
    """Each row ``answers`` times, one after the other, its eligible tokens masked: [P G, L]."""
    tokens, documents = canvas_like(rows, mask_id)
    repeated = [
        np.repeat(np.asarray(a), answers, axis=0) for a in (tokens, rows.eligible, documents)
    ]
    return Batch(*repeated, np.zeros(len(repeated[0]), np.int32))


def texts(canvas: Batch, tokens: np.ndarray, codec: "Tokenizer") -> list[tuple[str, str]]:
    """(prompt, answer) of each row, the answer cut at its first EOS, as rewards read them.

    Padding and masks in an answer are shown as masks, so that no checker takes it for right.
    """
    found = []
    for row, written in enumerate(np.asarray(tokens)):
        eligible = np.asarray(canvas.eligible[row])
        first = np.argmax(eligible)
        prompt = (np.asarray(canvas.documents[row]) > 0) & (np.arange(len(written)) < first)
        ids = codec.truncate_at_eos(written[eligible])
        shown = np.where(ids == codec.pad_id, codec.mask_id, ids)
        found.append((codec.decode(np.asarray(canvas.tokens[row])[prompt]), codec.decode(shown)))
    return found


def hide_tail(tokens: np.ndarray, eligible: np.ndarray, eos_id: int, mask_id: int) -> tuple:
    """Tokens and eligible positions whose tail, after the first EOS, is masked and never scored.

    In every view of every network the tail is then the same masks: it cannot tell where the answer
    ends. Visible and unscored padding would, and the decision to stop would get no gradient.
    """
    end = (tokens == eos_id) & eligible
    tail = eligible & (np.cumsum(end, axis=1) - end > 0)
    return np.where(tail, mask_id, tokens), eligible & ~tail
