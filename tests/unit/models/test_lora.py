"""Adapters: products, gradients, a run against the full run in the same subspace, dropout."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax import random

from mdm_jax import meter, sharding, training, variance
from mdm_jax.meter.subject import random_signs
from mdm_jax.models import lora
from mdm_jax.objectives.objective import accumulate_gradient, summed_loss
from mdm_jax.rng import step_key
from mdm_jax.training.step import step_draw

ROWS, RATE = 4, 0.5
SPEC = lora.Lora(rank=2, alpha=3.0, targets=("query", "value", "out", "down"))


def made(spec=SPEC, scan=False, depth=2):
    """(model, parameters, adapters whose B is not zero) of a model with shared key-value heads."""
    model = tiny.transformer(depth=depth, scan_layers=scan, num_kv_heads=1, mlp="swiglu")
    params = tiny.parameters(model, tiny.LENGTH)
    adapters = jax.eval_shape(lambda: lora.init(random.key(0), params, spec))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), adapters)
    return model, params, tiny.perturbed(zeros, seed=1)


def flat(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def stepped(model, params, spec, num_microbatches=1, chain=None, seed=3):
    def variables(adapters, key, rows):
        return lora.join(params, adapters, spec, key, rows)

    return tiny.step_fn(
        ROWS,
        optax.sgd(RATE),
        model.apply,
        chain,
        seed=seed,
        num_microbatches=num_microbatches,
        variables=variables,
    )


def state_of(adapters, spec, chain=None):
    chain = tiny.transform() if chain is None else chain
    return training.new_state(adapters, optax.sgd(RATE), chain, spec)


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_of_adapters_is_the_full_run_in_their_subspace(scan):
    """With ``W' = W + s A B`` and the full gradient G at W': dL/dA = s G B^T, dL/dB = s A^T G."""
    model, params, adapters = made(scan=scan, depth=1)
    spec, step = stepped(model, params, SPEC, num_microbatches=2)
    state, jitted = state_of(adapters, spec), tiny.jit(step)
    loss, rows = summed_loss(model.apply, tiny.objective()), tiny.batch(ROWS)

    @tiny.jit
    def full(params, step):  # the same draw: transforms do not know what is trained
        draw = step_draw(3, step, tiny.transform(), state.variance, spec)
        gradients, sums, _ = accumulate_gradient(loss, params, rows, draw)
        return jax.tree.map(lambda g: g / sums.eligible, gradients)

    ours = flat(adapters["adapters"])
    for number in range(3):
        merged = lora.merge(params, {"adapters": _nested(adapters, ours)}, SPEC)
        gradient = flat(full(merged, jnp.int32(number))["params"])
        for name in {name.removesuffix("['a']").removesuffix("['b']") for name in ours}:
            g, a, b = gradient[f"{name}['kernel']"], ours[f"{name}['a']"], ours[f"{name}['b']"]
            ours[f"{name}['a']"] = a - RATE * SPEC.scale * g @ jnp.swapaxes(b, -1, -2)
            ours[f"{name}['b']"] = b - RATE * SPEC.scale * jnp.swapaxes(a, -1, -2) @ g
        state, _ = jitted(state, rows)
    assert set(state.params) == {"adapters"}
    theirs, begun = flat(state.params["adapters"]), flat(adapters["adapters"])
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        moved = np.max(np.abs(value - begun[name]))
        assert moved > 1e-4
        np.testing.assert_allclose(value, ours[name], rtol=0, atol=1e-6 + 1e-3 * moved)


def _nested(like, leaves):
    return jax.tree.unflatten(jax.tree.structure(like["adapters"]), leaves.values())


def test_unmerged_products_are_those_of_the_merged_kernels_scanned_or_not():
    for scan in (False, True):
        model, params, adapters = made(scan=scan)
        inputs = tiny.batch(ROWS).tokens
        plain, own, merged = (
            jax.jit(model.apply)(variables, inputs)
            for variables in (
                params,
                lora.join(params, adapters, SPEC),
                lora.merge(params, adapters, SPEC),
            )
        )
        np.testing.assert_allclose(own, merged, rtol=0, atol=1e-5)
        assert np.max(np.abs(own - plain)) > 0.1


def test_kernels_merged_in_another_dtype_are_not_rounded_to_that_of_the_base():
    _, params, adapters = made()
    base = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)

    def upcast(tree):
        return jax.tree.map(lambda leaf: leaf.astype("float32"), tree)

    exact = upcast(lora.merge(base, adapters, SPEC, "float32"))
    chex.assert_trees_all_equal(exact, lora.merge(upcast(base), adapters, SPEC))
    rounded = flat(upcast(lora.merge(base, adapters, SPEC)))
    assert any(np.any(value != rounded[name]) for name, value in flat(exact).items())


def test_new_adapters_change_nothing_and_are_functions_of_key_and_layer():
    (_, params, _), (_, stacked, _) = made(), made(scan=True)
    new = lora.init(random.key(4), params, SPEC)["adapters"]
    scanned = lora.init(random.key(4), stacked, SPEC)["adapters"]["blocks"]["block"]
    for layer in (0, 1):
        for name, part in (("query", "attention"), ("down", "mlp")):
            one, all_ = new[f"block_{layer}"][part][name], scanned[part][name]
            np.testing.assert_array_equal(one["a"], all_["a"][layer])
            assert not np.any(one["b"])
            rows = params["params"][f"block_{layer}"][part][name]["kernel"].shape[0]
            assert 0.8 < np.max(np.abs(one["a"])) * np.sqrt(rows) < 1.0
    assert np.any(new["block_0"]["mlp"]["down"]["a"] != new["block_1"]["mlp"]["down"]["a"])


def test_scale():
    assert lora.Lora(rank=16, alpha=8.0).scale == 0.5
    assert lora.Lora(rank=16, alpha=8.0, rslora=True).scale == 2.0


def test_dropout_is_a_function_of_key_layer_and_row():
    spec = lora.Lora(rank=2, alpha=3.0, dropout=0.5, targets=("down",))
    model, params, adapters = made(spec)
    inputs, key = tiny.batch(ROWS).tokens, random.key(7)

    @tiny.jit
    def dropped(key, rows, inputs):
        return model.apply(lora.join(params, adapters, spec, key, rows), inputs)

    whole = dropped(random.clone(key), jnp.arange(ROWS), inputs)
    plain = dropped(random.key(8), jnp.arange(ROWS), inputs)
    assert np.all(np.max(np.abs(whole - plain), axis=(1, 2)) > 1e-3)
    # Rows are what they are in another order.
    order = jnp.array([2, 0, 3, 1])
    part = dropped(random.clone(key), order, inputs[order])
    np.testing.assert_allclose(part, whole[order], rtol=0, atol=1e-5)
    # Scanned layers have the keys of layers that are not, which differ.
    stack = jax.tree.map(
        lambda *layers: jnp.stack(layers), *(adapters["adapters"][f"block_{i}"] for i in (0, 1))
    )
    stack = {"adapters": {"blocks": {"block": stack}}}
    found = [
        lora.join(params, tree, spec, random.clone(key), jnp.arange(ROWS))["adapter_settings"]
        for tree in (adapters, stack)
    ]
    scanned = random.key_data(found[1]["blocks"]["block"]["mlp"]["down"]["keys"])
    for layer in (0, 1):
        keys = random.key_data(found[0][f"block_{layer}"]["mlp"]["down"]["keys"])
        np.testing.assert_array_equal(scanned[layer], keys)
    assert np.all(np.any(scanned[0] != scanned[1], axis=-1))


def test_muon_takes_its_step_for_each_factor_as_optax_does_for_matrices():
    _, params, adapters = made()
    gradients = tiny.perturbed(jax.tree.map(jnp.zeros_like, adapters), seed=2)
    ours = training.muon(lambda _: 0.1, b1=0.8, clip_norm=None)
    theirs = optax.contrib.muon(0.1, adam_b1=0.8, weight_decay=0.0)  # of all that have two axes

    @tiny.jit
    def steps(tree, gradients):
        updates = []
        for optimizer in (ours, theirs):
            state = optimizer.init(tree)
            _, state = optimizer.update(gradients, state, tree)
            updates.append(optimizer.update(gradients, state, tree)[0])
        return updates

    found, expected = map(flat, steps(adapters, gradients))
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-6)
        singular = np.linalg.svd(value, compute_uv=False)
        assert singular.max() < 2.5 * singular.min()  # orthogonalised, unlike an Adam step
    # Scanned layers are a stack of matrices.
    stack = jax.tree.map(
        lambda *layers: jnp.stack(layers), *(gradients["adapters"][f"block_{i}"] for i in (0, 1))
    )
    stack = {"adapters": {"blocks": {"block": stack}}}
    stacked = flat(tiny.jit(lambda t: ours.update(t, ours.init(t), t)[0])(stack))
    single = flat(tiny.jit(lambda t: ours.update(t, ours.init(t), t)[0])(gradients))
    for name, value in stacked.items():
        for i in (0, 1):
            one = single[name.replace("['blocks']['block']", f"['block_{i}']")]
            np.testing.assert_allclose(value[i], one, rtol=0, atol=1e-6)


def test_dropped_inputs_have_the_mean_of_the_inputs():
    """40,000 inputs of 1: the standard error of the mean is sqrt(0.25 / 0.75 / 4e4) = 0.003."""
    keys = random.split(random.key(0), 4)
    values = lora._dropped(jnp.ones((8, 50, 100)), keys, jnp.float32(0.75))
    np.testing.assert_allclose(np.unique(values), [0, 1 / 0.75], rtol=1e-6)
    assert abs(float(jnp.mean(values)) - 1) < 4 * 0.003
    assert all(np.any(values[i] != values[j]) for i in range(8) for j in range(i))


@pytest.mark.slow
def test_dropout_of_a_step_does_not_depend_on_microbatches_and_changes_with_the_step():
    spec, chain = lora.Lora(rank=2, alpha=3.0, dropout=0.5, targets=("down",)), tiny.transform()
    model, params, adapters = made(spec, depth=1)
    trained = []
    for parts in (1, 2):
        draw_spec, step = stepped(model, params, spec, parts, chain)
        state, jitted = state_of(adapters, draw_spec, chain), tiny.jit(step)
        trained.append(jitted(state, tiny.batch(ROWS))[0].params)
    whole, cut = map(flat, trained)
    masks = [
        lora.join(params, adapters, spec, step_key(3, number), jnp.arange(ROWS))["adapter_settings"]
        for number in (0, 1)
    ]
    first, second = (random.key_data(m["block_0"]["mlp"]["down"]["keys"]) for m in masks)
    assert np.all(np.any(first != second, axis=-1))
    for name, value in whole.items():
        np.testing.assert_allclose(value, cut[name], rtol=0, atol=1e-5)
        assert np.max(np.abs(value - flat(adapters)[name])) > 1e-3


def test_the_meter_measures_gradients_of_adapters_alone():
    model, params, adapters = made(depth=1)
    variables = lora.join(params, adapters, SPEC)
    spec = tiny.objective().spec(ROWS, tiny.LENGTH)
    chain, rows = variance.chain(), tiny.batch(ROWS)
    draw = step_draw(3, 0, chain, chain.init(spec), spec)
    estimator = meter.make_estimator(model.apply, tiny.objective())
    found = flat(estimator.gradient(variables, rows, draw, 2))
    loss = summed_loss(model.apply, tiny.objective())

    @tiny.jit
    def expected(adapters):
        of = jax.grad(lambda a: loss(lora.join(params, a, SPEC), rows, draw), has_aux=True)
        gradient, (sums, _) = of(adapters)
        return jax.tree.map(lambda g: g / sums.eligible, gradient)

    wanted = flat(expected(adapters))
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, wanted[name], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_meter_s_random_directions_are_of_adapters_alone():
    """Their derivative is the sum of signs times the gradient, over all rows."""
    model, params, adapters = made(depth=1)
    spec, chain, rows = tiny.objective().spec(ROWS, tiny.LENGTH), variance.chain(), tiny.batch(ROWS)
    draw = step_draw(3, 0, chain, chain.init(spec), spec)
    estimator = meter.make_estimator(model.apply, tiny.objective())
    variables = lora.join(params, adapters, SPEC)
    _, along = estimator.directional(variables, rows, draw, random.key(0), 1)
    signs = random_signs(random.fold_in(random.key(0), 0), adapters)
    gradient = estimator.gradient(variables, rows, draw, 1)
    dots = [jnp.vdot(*both) for both in zip(jax.tree.leaves(signs), jax.tree.leaves(gradient))]
    np.testing.assert_allclose(jnp.sum(along), sum(dots) * rows.eligible.sum(), rtol=1e-4)


@pytest.mark.slow
def test_eight_devices_give_what_one_does():
    spec = lora.Lora(rank=2, alpha=3.0, dropout=0.5)
    model, params, adapters = made(spec)
    init = training.linen_init(model, tiny.LENGTH)
    mesh = sharding.make_mesh(fsdp=4, tensor=2)

    def boxed():
        return lora.init(random.key(0), jax.eval_shape(init, random.key(0)), spec)

    def place(tree, abstract):
        return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), tree, abstract)

    base = place(params, sharding.abstract_sharded(lambda: init(random.key(0)), mesh))
    shares = sharding.abstract_sharded(boxed, mesh)
    a = shares["adapters"]["block_0"]["mlp"]["down"]["a"].sharding.spec
    assert tuple(a) == ("tensor", None)
    draw_spec, step = stepped(model, params, spec)
    one, _ = tiny.jit(step)(state_of(adapters, draw_spec), tiny.batch(ROWS))
    apply = sharding.sharded_apply(model.apply, mesh, sharding.LOGICAL_RULES)
    rows = sharding.place_batch(tiny.batch(ROWS), sharding.batch_sharding(mesh))
    settings = {"seed": 3, "variables": lambda a, *key: lora.join(base, a, spec, *key)}
    _, step = tiny.step_fn(ROWS, optax.sgd(RATE), apply, **settings)
    several, _ = jax.jit(step)(state_of(place(adapters, shares), draw_spec), rows)
    for name, value in flat(several.params).items():
        np.testing.assert_allclose(value, flat(one.params)[name], rtol=0, atol=1e-4)
