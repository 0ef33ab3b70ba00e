"""The variance zoo over a loaded model, whose enumerated bound is the mean of every transform."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from variants import slow_except

from mdm_jax import corruption, hub, objectives, testing
from mdm_jax.draws import Draw
from mdm_jax.types import Batch

DATA = pathlib.Path(__file__).parents[1] / "data" / "hub" / "a2d_qwen3-3"
NUM_DRAWS, ROWS, LENGTH = 400, 4, 4
FEW = {
    "stratified_mirror",
    "levels_ppots_rotate",
}


@functools.cache
def setting():
    """Model, its mask token, a batch of four tokens a row, and the objective."""
    model = hub.load(DATA, dtype="float32")
    facts = json.loads((DATA / "reference.json").read_text("utf-8"))
    with np.load(DATA / "reference.npz") as arrays:
        tokens = arrays["input_ids"][0, : ROWS * LENGTH].reshape(ROWS, LENGTH)
    mask_id = facts["mask_token_id"]
    tokens = np.where(tokens == mask_id, 0, tokens).astype(np.int32)
    whole = np.ones(tokens.shape, bool)
    batch = Batch(tokens, whole, whole.astype(np.int32), np.full(ROWS, LENGTH))
    bound = objectives.masked_nelbo(corruption.fixed_count(mask_id))
    return model, mask_id, batch, bound


@functools.cache
def losses():
    """Jitted draws [N, V, B, ...] -> weighted losses of rows, [N, B], views averaged."""
    model, _, batch, bound = setting()

    def one(params, draw):
        stats = bound.loss(functools.partial(model.model.apply, params), batch, draw)
        return jnp.mean(jnp.exp(draw.log_weight) * stats.weight * stats.raw, axis=0)[:, 0]

    run = jax.jit(lambda params, draws: jax.lax.map(functools.partial(one, params), draws))
    return functools.partial(run, model.params)


@functools.cache
def enumerated():
    model, mask_id, batch, _ = setting()
    return testing.exact_nelbo(functools.partial(model.model.apply, model.params), batch, mask_id)


@pytest.mark.parametrize("name", slow_except(FEW, [n for n in zoo.EXACT if n in zoo.FACTORIES]))
def test_the_bound_of_a_loaded_model_is_the_mean_under_every_transform(name):
    """5 standard errors of the spread over independent batches, in which couplings are."""
    spec = setting()[3].spec(ROWS, LENGTH)
    draw = zoo.draw_function(spec, (name,))(zoo.draw_keys(NUM_DRAWS))[name]
    found = np.asarray(losses()(Draw(*draw)), np.float64)
    error = found.std(0, ddof=1) / NUM_DRAWS**0.5
    assert np.all(error < 0.1 * enumerated())
    np.testing.assert_array_less(np.abs(found.mean(0) - enumerated()), 5 * error + 1e-4)
