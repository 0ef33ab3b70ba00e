"""One training step: meshes, microbatches, normalisation, prompts and padding, compilation, NaN."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from variants import slow_except

from mdm_jax import sharding as mdm_jax_sharding
from mdm_jax import training, variance
from mdm_jax.draws import split_rows
from mdm_jax.variance.transform import Phase

ROWS = 16


def _assert_close(first, second, rtol=2e-5, atol=2e-6):
    chex.assert_trees_all_close(jax.device_get(first), jax.device_get(second), rtol=rtol, atol=atol)


def _assert_same_bits(first, second):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(first), jax.device_get(second))


@functools.cache
def _compiled(parts):
    spec, step = tiny.step_fn(ROWS, num_microbatches=parts)
    return tiny.new_state(spec), tiny.jit(step)


def _one_step(parts=1, batch=None):
    state, step = _compiled(parts)
    return step(state, tiny.batch(ROWS) if batch is None else batch)


def _draw(step):
    spec, _ = tiny.step_fn(ROWS)
    chain = tiny.transform()
    return training.step_draw(3, step, chain, chain.init(spec), spec)


# --- microbatches -------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_microbatches_equal_the_full_batch(parts):
    """SGD at rate 1 makes the parameters' change the gradient itself."""
    whole, metrics = _one_step()
    split, split_metrics = _one_step(parts)
    assert float(metrics.gradient_norm) > 0.1
    _assert_close(split.params, whole.params)
    _assert_close(split_metrics, metrics)


@pytest.mark.slow
def test_a_mean_of_means_would_be_noticed():
    """The batch above tells the token mean from the mean over microbatches."""
    whole, metrics = _one_step()
    gradient = jax.tree.map(jnp.subtract, tiny.params(), whole.params)
    batch, objective = tiny.batch(ROWS), tiny.objective()

    @tiny.jit
    @jax.value_and_grad
    def mean_of_means(params):
        def mean(part, draw):
            stats = objective.loss(lambda *a: tiny.apply_fn(params, *a), part, draw)
            return jnp.sum(stats.raw * stats.weight) / jnp.maximum(jnp.sum(stats.eligible), 1.0)

        parts, draws_of = split_rows(batch, 4, axis=0), split_rows(_draw(0), 4, axis=1)
        return jnp.mean(jax.vmap(mean)(parts, draws_of))

    loss, wrong = mean_of_means(tiny.params())
    assert abs(float(loss - metrics.loss)) > 0.01 * float(metrics.loss)
    distance = optax.tree.norm(jax.tree.map(jnp.subtract, wrong, gradient))
    assert float(distance) > 0.05 * float(optax.tree.norm(gradient))


def test_loss_is_total_nats_over_total_tokens():
    """Against a plain sum over rows, in float64."""
    batch = tiny.batch(ROWS)
    stats = tiny.jit(
        lambda: tiny.objective().loss(
            lambda *inputs: tiny.apply_fn(tiny.params(), *inputs), batch, _draw(0)
        )
    )()
    raw, weight = np.asarray(stats.raw, np.float64), np.asarray(stats.weight, np.float64)
    nats = sum(raw[v, b, 0] * weight[v, b, 0] for v in range(2) for b in range(ROWS)) / 2
    _, metrics = _one_step()
    np.testing.assert_allclose(metrics.loss, nats / batch.eligible.sum(), rtol=1e-5)
    bits = nats / batch.units.sum() / np.log(2)
    np.testing.assert_allclose(metrics.bits_per_unit, bits, rtol=1e-5)
    entropy = raw.sum() / np.asarray(stats.targets).sum()
    np.testing.assert_allclose(metrics.cross_entropy, entropy, rtol=1e-5)


def test_a_batch_without_eligible_tokens_is_zero_and_finite():
    for parts in (1, 4):
        state, metrics = _one_step(parts, tiny.batch(ROWS, counts=(0,)))
        for name in ("loss", "bits_per_unit", "cross_entropy", "gradient_norm", "skipped"):
            assert float(getattr(metrics, name)) == 0.0, name
        _assert_same_bits(state.params, tiny.params())


@pytest.mark.parametrize("parts", [0, 3, 32])
def test_microbatches_that_do_not_divide_are_refused(parts):
    with pytest.raises(ValueError, match="num_microbatches must be"):
        tiny.step_fn(ROWS, num_microbatches=parts)


def test_ema_decay_out_of_range_is_refused():
    with pytest.raises(ValueError, match="ema_decay"):
        tiny.step_fn(ROWS, ema_decay=1.0)


def test_ema_follows_the_parameters():
    spec, step = tiny.step_fn(ROWS, ema_decay=0.5, optimizer=optax.sgd(0.1))
    step = tiny.jit(step)
    state = tiny.new_state(spec, optax.sgd(0.1))
    expected = np.asarray(state.params["kernel"], np.float64)
    for done in range(12):
        state, _ = step(state, tiny.batch(ROWS, seed=done))
        decay = min(0.5, (1 + done) / (10 + done))
        expected = decay * expected + (1 - decay) * np.asarray(state.params["kernel"], np.float64)
    np.testing.assert_allclose(state.ema["kernel"], expected, rtol=1e-5)


# --- meshes -------------------------------------------------------------------------------------


MODEL = tiny.transformer()


def _init(optimizer=None):
    variables, (spec, _) = training.linen_init(MODEL, tiny.LENGTH), tiny.step_fn(ROWS)
    chosen = optax.sgd(1.0) if optimizer is None else optimizer
    return lambda: training.new_state(variables(jax.random.key(1)), chosen, tiny.transform(), spec)


@functools.cache
def _transformer_start():
    """State on one device; the head starts at zero, where most gradients vanish, so it is moved."""
    state = jax.device_get(nn.meta.unbox(tiny.jit(_init())()))
    return state.replace(params=tiny.perturbed(state.params, scale=0.1))


@functools.cache
def _transformer_step():
    _, step = tiny.step_fn(ROWS, apply=MODEL.apply)
    return tiny.jit(step)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"data": 8}, marks=pytest.mark.slow),
        pytest.param({"data": 4, "fsdp": 2}, marks=pytest.mark.slow),
        {"data": 2, "fsdp": 2, "tensor": 2},
    ],
    ids=str,
)
def test_eight_devices_equal_one(sizes):
    start = _transformer_start()
    alone, metrics = _transformer_step()(start, tiny.batch(ROWS))
    assert float(metrics.gradient_norm) > 0.1

    mesh = mdm_jax_sharding.make_mesh(**sizes)
    abstract = mdm_jax_sharding.abstract_sharded(_init(), mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    mdm_jax_sharding.check_batch_size(mesh, ROWS, 2)
    placed = mdm_jax_sharding.place_batch(tiny.batch(ROWS), mdm_jax_sharding.batch_sharding(mesh))
    assert len(placed.tokens.sharding.device_set) == 8
    _, step = tiny.step_fn(ROWS, apply=MODEL.apply, num_microbatches=2)
    step = tiny.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    # A copy: device_put may share buffers, and the step donates them.
    spread, spread_metrics = step(jax.device_put(jax.tree.map(jnp.copy, start), shardings), placed)
    _assert_close(spread.params, alone.params)
    _assert_close(spread.ema, alone.ema)
    _assert_close(spread_metrics, metrics)
    whole = [leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(spread.params)]
    assert all(whole) == (sizes.get("fsdp", 1) == 1)
    query = spread.params["params"]["block_0"]["attention"]["query"]["kernel"]
    share = query.addressable_shards[0].data.shape
    assert share == (16 // sizes.get("fsdp", 1), 16 // sizes.get("tensor", 1))


def test_initial_values_do_not_depend_on_the_mesh():
    first, _ = mdm_jax_sharding.init_sharded(_init(), mdm_jax_sharding.make_mesh())
    mesh = mdm_jax_sharding.make_mesh(data=2, fsdp=2, tensor=2)
    second, shardings = mdm_jax_sharding.init_sharded(_init(), mesh)
    _assert_same_bits(first, second)
    for tree in (second, mdm_jax_sharding.abstract_sharded(_init(), mesh)):
        assert jax.tree.map(lambda leaf: leaf.sharding, tree) == shardings


def test_mesh_errors():
    with pytest.raises(ValueError, match="does not use the 8 devices"):
        mdm_jax_sharding.make_mesh(data=3)
    with pytest.raises(ValueError, match="'tensor' must be positive"):
        mdm_jax_sharding.make_mesh(tensor=0)
    with pytest.raises(ValueError, match="multiple of 16"):
        mdm_jax_sharding.check_batch_size(mdm_jax_sharding.make_mesh(), 24, 2)


def test_a_dimension_that_does_not_divide_is_kept_whole():
    state = mdm_jax_sharding.abstract_sharded(_init(), mdm_jax_sharding.make_mesh(data=4, tensor=2))
    embedding = state.params["params"]["embedding"]  # 7 ids are not cut in two
    assert embedding.sharding.is_fully_replicated
    up = state.params["params"]["block_0"]["mlp"]["up"]["kernel"]
    assert up.sharding.shard_shape(up.shape) == (16, 32)


# --- prompts and padding ------------------------------------------------------------------------


def test_padding_tokens_change_nothing():
    state, batch = _transformer_start(), tiny.batch(ROWS)
    padding = batch.documents == 0
    assert padding.sum() > 10
    other = np.where(padding, (batch.tokens + 1) % tiny.MASK_ID, batch.tokens)
    first, first_metrics = _transformer_step()(state, batch)
    second, second_metrics = _transformer_step()(state, batch._replace(tokens=other))
    _assert_same_bits(first.params, second.params)
    _assert_same_bits(first_metrics, second_metrics)
    before, after = (s.params["params"]["embedding"] for s in (state, first))
    assert not np.array_equal(before, after)


def test_an_id_that_only_padding_holds_gets_no_gradient():
    batch = tiny.batch(ROWS)
    batch = batch._replace(tokens=np.where(batch.documents == 0, 5, batch.tokens % 5))
    state, _ = _one_step(batch=batch)
    moved = np.asarray(state.params["embedding"] - tiny.params()["embedding"])
    assert np.all(moved[5] == 0) and np.all(np.abs(moved[:5]).max(-1) > 0)


def test_prompt_tokens_are_context_and_never_masked_or_scored():
    objective, batch = tiny.objective(), tiny.batch(ROWS)
    prompt = (batch.documents > 0) & ~batch.eligible
    assert prompt.sum() > 5
    fixed, clean = (np.repeat(a, 2, axis=0) for a in (~batch.eligible, batch.tokens))

    @tiny.jit
    def run(step, batch):
        draw, seen = _draw(step), []

        def loss(extra):
            def model_fn(inputs, logsnr, documents):
                seen.append(inputs)
                return tiny.apply_fn(tiny.params(), inputs, logsnr, documents) + extra

            stats = objective.loss(model_fn, batch, draw)
            return jnp.sum(stats.raw * stats.weight), seen[0]

        zero = jnp.zeros((2 * ROWS, tiny.LENGTH, tiny.VOCAB))
        (value, inputs), gradient = jax.value_and_grad(loss, has_aux=True)(zero)
        return value, inputs, gradient

    other = batch._replace(tokens=np.where(prompt, (batch.tokens + 1) % 6, batch.tokens))
    for step in range(8):
        value, inputs, gradient = jax.device_get(run(step, batch))
        np.testing.assert_array_equal(inputs[fixed], clean[fixed])
        assert np.any(inputs[~fixed] == tiny.MASK_ID)
        assert np.all(gradient[fixed] == 0) and np.any(gradient[~fixed] != 0)
        assert run(step, other)[0] != value  # the prompt is read as context


# --- compilation and state structure ------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", slow_except({"adamw"}, ["adamw", "muon"]))
def test_one_trace_and_a_stable_state(optimizer):
    chosen = getattr(training, optimizer)(training.warmup_cosine(1e-2, 2, 20))
    _, step = tiny.step_fn(ROWS, apply=MODEL.apply, optimizer=chosen)
    mesh = mdm_jax_sharding.make_mesh(data=4, fsdp=2)
    state, shardings = mdm_jax_sharding.init_sharded(_init(chosen), mesh)
    chex.clear_trace_counter()
    step = chex.assert_max_traces(step, n=1)
    step = tiny.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    sharding = mdm_jax_sharding.batch_sharding(mesh)

    def form(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, str(leaf.sharding)), tree)

    before = form(state)
    for number in range(4):
        given = state
        state, metrics = step(
            given, mdm_jax_sharding.place_batch(tiny.batch(ROWS, number), sharding)
        )
        assert given.params["params"]["embedding"].is_deleted()  # donated
        assert form(state) == before
    assert step._cache_size() == 1
    assert int(state.step) == 4 and int(state.skipped) == 0
    chex.assert_tree_all_finite(state.params)
    assert all(leaf.shape == () for leaf in metrics)


# --- steps that are not finite ------------------------------------------------------------------


def _poisonable(params, inputs, logsnr, documents):
    """The tiny network, NaN as soon as a row begins with token 5."""
    logits = tiny.apply_fn(params, inputs, logsnr, documents)
    return jnp.where(jnp.any(inputs[:, 0] == 5), jnp.nan, 1.0) * logits


def _poisoned(batch, poison):
    tokens = np.array(batch.tokens)
    tokens[:, 0] = 5 if poison else 1
    # Not eligible, so that it is never masked away.
    eligible = np.array(batch.eligible)
    eligible[:, 0] = False
    return batch._replace(tokens=tokens, eligible=eligible)


def _counting():
    """A transform whose state moves at every update, as an adaptive one's would."""
    return variance.chain(
        variance.stratified(),
        variance.VarianceTransform(
            name="count",
            phase=Phase.WARP,
            init=lambda spec: jnp.zeros(()),
            draw=lambda key, state, draw, spec: draw,
            update=lambda state, draw, stats: state + jnp.sum(stats.raw),
        ),
    )


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_step_that_is_not_finite_is_skipped_and_counted(parts):
    optimizer, chain = optax.adam(0.1), _counting()
    spec, step = tiny.step_fn(
        ROWS, optimizer, _poisonable, chain, num_microbatches=parts, ema_decay=0.9
    )
    step = tiny.jit(step)
    state = tiny.new_state(spec, optimizer, chain)
    in_a_row, skipped = 0, 0
    for number, poison in enumerate([0, 1, 1, 0, 1, 0, 0]):
        before = state
        state, metrics = step(before, _poisoned(tiny.batch(ROWS, number), poison))
        in_a_row = in_a_row + 1 if poison else 0
        skipped += poison
        assert (int(state.skipped), int(state.skipped_in_a_row)) == (skipped, in_a_row)
        assert (float(metrics.skipped), int(metrics.skipped_in_a_row)) == (poison, in_a_row)
        assert int(state.step) == number + 1  # noise moves on
        kept = ("params", "ema", "opt_state", "variance")
        if poison:
            assert not np.isfinite(metrics.gradient_norm)
            for name in kept:
                _assert_same_bits(getattr(state, name), getattr(before, name))
        else:
            assert not np.array_equal(state.params["kernel"], before.params["kernel"])
            assert float(state.variance["count"]) > float(before.variance["count"])
        chex.assert_tree_all_finite([getattr(state, name) for name in kept])


def test_a_skipped_step_is_counted_by_an_adaptive_transform():
    """P-POTS learns from finite steps only, and its count of refused ones reaches the state."""
    optimizer = optax.adam(0.1)
    chain = variance.chain(variance.ppots(num_bins=4, warmup_steps=0))
    spec, step = tiny.step_fn(ROWS, optimizer, _poisonable, chain)
    step, state = tiny.jit(step), tiny.new_state(spec, optimizer, chain)
    for number, poison in enumerate([0, 1, 1, 0]):
        before = state.variance["ppots"]
        state, _ = step(state, _poisoned(tiny.batch(ROWS, number), poison))
        after = state.variance["ppots"]
        assert int(after.rejected) - int(before.rejected) == poison
        assert int(after.steps) - int(before.steps) == 1 - poison
        moved = not np.array_equal(after.second, before.second)
        assert moved == (not poison)
    chex.assert_tree_all_finite(state.variance)


def test_a_gradient_that_overflows_is_skipped():
    """The loss is finite; the square of the gradient's norm is not."""

    def apply(params, inputs, logsnr, documents):
        logits = tiny.apply_fn(params, inputs, logsnr, documents)
        first = params["kernel"][0, 0]
        zero = 1e30 * (first - jax.lax.stop_gradient(first))
        return logits + zero * jax.lax.broadcasted_iota(jnp.float32, logits.shape, 2)

    spec, step = tiny.step_fn(ROWS, apply=apply)
    state, metrics = tiny.jit(step)(tiny.new_state(spec), tiny.batch(ROWS))
    assert np.isfinite(metrics.loss) and float(metrics.skipped) == 1.0
    _assert_same_bits(state.params, tiny.params())


@pytest.mark.parametrize("recompute", [False, True])
def test_an_update_that_is_not_finite_is_skipped(recompute):
    """Finite loss and gradient, but an optimiser that divides by zero at its third step."""
    calls = []

    def update(updates, state, params=None):
        calls.append(1)
        bad = jnp.where(state == 2, jnp.nan, 0.1)
        return jax.tree.map(lambda g: bad * g, updates), state + 1

    optimizer = optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)
    spec, step = tiny.step_fn(ROWS, optimizer, recompute_update=recompute)
    step, state = tiny.jit(step), tiny.new_state(spec, optimizer)
    flags = []
    for number in range(4):
        state, metrics = step(state, tiny.batch(ROWS, number))
        flags.append(float(metrics.skipped))
        assert np.isfinite(metrics.loss)
    assert flags == [0, 0, 1, 1]  # its own counter is rolled back with the rest
    chex.assert_tree_all_finite(state.params)
    assert len(calls) == 1 + recompute


def test_an_update_computed_twice_is_the_same():
    """The second time behind a barrier, which keeps the compiler from holding the first."""
    optimizer = training.adamw(optax.constant_schedule(0.1), b2=0.999)
    ends = []
    for recompute in (False, True):
        spec, step = tiny.step_fn(ROWS, optimizer, recompute_update=recompute)
        state = tiny.new_state(spec, optimizer)
        lowered = jax.jit(step).lower(state, tiny.batch(ROWS))
        ends.append(lowered.compile()(state, tiny.batch(ROWS)))
        assert ("optimization_barrier" in lowered.as_text()) == recompute
    _assert_close(*ends)
