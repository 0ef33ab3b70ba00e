"""Partition models: conditionals of the other group alone, one pass for both, sparse sampling."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mdm_jax import data, models, objectives, samplers, testing
from mdm_jax.corruption import fixed_count
from mdm_jax.draws import Draw
from mdm_jax.launch import presets
from mdm_jax.launch.build import make_experiment
from mdm_jax.models.cross_entropy import as_logits
from mdm_jax.testing import toys

MASK = toys.MASK_ID
SHAPE = {"vocab_size": MASK + 1, "width": 16, "num_heads": 2, "qk_norm": True, "rope_base": 100.0}


@functools.cache
def model_and_params(depth=2, **settings):
    config = models.TransformerConfig(**SHAPE | {"depth": depth} | settings)
    model = models.Partition(config, MASK, 1)
    return model, tiny.parameters(model, toys.LENGTH)


def rows(count, length, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, MASK, (count, length)), rng.random((count, length)) < 0.5


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param(
            {"depth": 3, "tie_embeddings": True, "norm": "layer", "learned_positions": 9},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_pass_over_two_groups_is_two_passes_over_masked_rows(settings):
    """What a group predicts of the other does not depend on the tokens that it predicts."""
    model, params = model_and_params(**settings)
    tokens, group = rows(6, 7)
    group[0], group[1] = True, False  # an empty context
    documents = np.ones_like(tokens)
    documents[2, :3], documents[3, 5:] = 2, 0
    prompt = np.zeros_like(group)
    prompt[4, :3] = prompt[5, 1:4] = True
    call = tiny.jit(model.apply)
    for shared, length in ((np.zeros_like(group), 0), (prompt, 4)):
        pair = models.pair_apply(model, prompt_length=length)
        groups = (group & ~shared, ~group & ~shared)
        both = np.concatenate([np.where(own, MASK, tokens) for own in groups], axis=1)
        found = tiny.jit(lambda *a, pair=pair: as_logits(pair(*a)))(params, both, None, documents)
        for own in groups:
            expected = call(params, np.where(own, MASK, tokens), None, documents)
            np.testing.assert_allclose(found[own], expected[own], rtol=1e-5, atol=2e-6)
    # Documents and padding are out of sight; the rest is seen.
    changed = tokens.copy()
    changed[2, :3], changed[3, 5:] = (tokens[2, :3] + 1) % 3, (tokens[3, 5:] + 1) % 3
    other = call(params, np.where(group, MASK, changed), None, documents)
    expected = call(params, np.where(group, MASK, tokens), None, documents)
    kept = group & (documents == 1)
    np.testing.assert_array_equal(other[kept], expected[kept])
    alone = call(params, np.where(group, MASK, changed), None, np.ones_like(tokens))
    seen = group[2] & (documents[2] == 1)
    assert seen.any() and np.abs(alone[2, seen] - expected[2, seen]).min() > 1e-6


def enumerated_draws(cells, count):
    """A draw of every cell of the level and every order of the noise, ``count`` times."""
    orders = np.array(list(itertools.permutations(range(toys.LENGTH))))
    u = (np.arange(cells) + 0.5) / cells
    u, order = np.repeat(u, len(orders)), np.tile(orders, (cells, 1))
    u, noise = np.tile(u, count), np.tile((order + 0.5) / toys.LENGTH, (count, 1))
    levels = jnp.asarray(u, jnp.float32)[None, :, None]
    return Draw(levels, jnp.zeros_like(levels), jnp.asarray(noise, jnp.float32)[None])


def pair_losses(params, objective, apply, draw, rows=None):
    """Weighted losses of every draw, [3, draws], and stats."""
    count = draw.u.shape[1] // 3
    rows = toys.toy_batch() if rows is None else rows
    batch = jax.tree.map(lambda a: jnp.repeat(a, count, axis=0), rows)
    stats = objective.loss(functools.partial(apply, params), batch, draw)
    return (stats.weight * stats.raw).reshape(3, -1), stats


def test_the_objective_is_the_enumerated_bound():
    """Of pairs at every level and order, against all masks; constant losses have no noise."""
    model, params = model_and_params()
    objective, draws = objectives.partition_nelbo(MASK), enumerated_draws(8, 3)
    assert objective.bias == "exact"
    run = tiny.jit(lambda p: pair_losses(p, objective, models.pair_apply(model), draws))
    value, stats = run(params)
    exact = testing.exact_nelbo(functools.partial(model.apply, params), toys.toy_batch(), MASK)
    np.testing.assert_allclose(value.mean(1), exact, rtol=1e-5)
    np.testing.assert_array_equal(stats.targets, 4)
    flat = jax.tree.map(lambda leaf: leaf, params)
    flat["params"]["head"] = jax.tree.map(np.zeros_like, params["params"]["head"])
    np.testing.assert_allclose(run(flat)[0], 4 * np.log(3), rtol=1e-6)


def test_so_it_is_where_rows_begin_with_prompts():
    """Of none, one or two tokens that are always visible."""
    model, params = model_and_params()
    batch = toys.toy_batch()
    eligible = np.arange(toys.LENGTH)[None] >= np.arange(3)[:, None]
    batch = batch._replace(eligible=eligible)
    objective, draws = objectives.partition_nelbo(MASK), enumerated_draws(24, 3)
    apply = models.pair_apply(model, prompt_length=2)
    value, stats = tiny.jit(lambda p: pair_losses(p, objective, apply, draws, batch))(params)
    exact = testing.exact_nelbo(functools.partial(model.apply, params), batch, MASK)
    np.testing.assert_allclose(value.mean(1), exact, rtol=1e-5)
    np.testing.assert_array_equal(stats.targets.reshape(3, -1)[:, 0], [4, 3, 2])


@pytest.mark.slow
def test_its_gradient_is_that_of_masked_rows():
    model, params = model_and_params()

    @tiny.jit
    def slopes(params):
        slope = jax.grad(lambda *given: jnp.sum(jnp.mean(pair_losses(*given)[0], axis=1)))
        pair, single = models.pair_apply(model, models.Chunking()), models.readout_apply(model)
        masked = objectives.masked_nelbo(fixed_count(MASK))
        return (
            slope(params, objectives.partition_nelbo(MASK), pair, enumerated_draws(8, 3)),
            slope(params, masked, single, enumerated_draws(4, 3)),
        )

    for one, other in zip(*map(jax.tree.leaves, slopes(params)), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * max(1, np.abs(other).max()))


def test_samplers_run_on_revealed_tokens_alone():
    """Logits are those of the whole network, for every number of revealed tokens."""
    model, params = model_and_params(learned_positions=8)
    tokens, _ = rows(8, 8, seed=1)
    documents = np.ones_like(tokens)
    documents[4:, :2], documents[5, 6:] = 2, 0
    revealed = models.revealed_apply(model, sizes=2)
    at = np.array([[1, 7]] * 8)

    @tiny.jit
    def run(*given):
        sparse = revealed(*given)
        return model.apply(*given), sparse.read(None).logits(), sparse.read(at).logits()

    rng = np.random.default_rng(0)
    for hidden in (0.0, 0.4, 1.0):
        inputs = np.where((rng.random(tokens.shape) < hidden) & (documents > 0), MASK, tokens)
        masked = inputs == MASK
        expected, found, some = run(params, inputs, None, documents)
        np.testing.assert_allclose(found[masked], expected[masked], rtol=1e-5, atol=2e-6)
        picked = np.take_along_axis(found, at[..., None], 1)
        np.testing.assert_allclose(some, picked, rtol=1e-5, atol=2e-6)


@pytest.mark.slow
def test_samples_are_those_of_the_whole_network():
    model, params = model_and_params()
    revealed = models.revealed_apply(model, sizes=2)
    canvas = np.full((4, 8), MASK)
    canvas[1, :3] = 1
    drawn = [
        samplers.make_generator(apply, samplers.first_hitting(), None, mask_id=MASK)(
            params, jax.random.key(0), canvas
        )
        for apply in (models.without_tokens(revealed, ()), model.apply)
    ]
    np.testing.assert_array_equal(*drawn)


def test_what_no_partition_model_has_is_refused():
    for settings, message in (
        ({"condition_on_logsnr": True}, "has no condition_on_logsnr"),
        ({"depth": 1}, "both need at least 1"),
    ):
        config = models.TransformerConfig(**SHAPE | settings)
        with pytest.raises(ValueError, match=message):
            tiny.parameters(models.Partition(config, MASK, 1), 4)


def test_a_config_of_prompts_and_answers_reads_prompts_with_both_groups():
    config = presets.text_partition("smoke")
    config.data.update(source="task", length=128, train_stride=1)
    config.data.task.update(train_rows=8, valid_rows=8, test_rows=8)
    experiment = make_experiment(config)
    layout = experiment.dataset.layout
    rows = data.gather(experiment.dataset.train, np.arange(4))
    shown = rows.documents * ~rows.eligible > 0
    assert shown[:, : layout.prompt_length].any() and not shown[:, layout.prompt_length :].any()
    params = experiment.abstract_state().params
    inputs = jax.ShapeDtypeStruct((4, 2 * layout.length), np.int32)
    traced = str(jax.make_jaxpr(experiment.apply_fn)(params, inputs, None, rows.documents))
    assert f"4,{layout.length + layout.prompt_length + 1},{config.model.width}" in traced
