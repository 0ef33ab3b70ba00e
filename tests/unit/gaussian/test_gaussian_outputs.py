"""Output parameterisations: conversions, implied weights and EDM's preconditioning."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax import gaussian
from mdm_jax.gaussian import parameterisations as outputs
from mdm_jax.gaussian import paths

# Factories, so that an output is built in the precision of the test.
ZOO = outputs.OUTPUTS | {"edm_wide": lambda: outputs.edm(1.7)}
every_path = pytest.mark.parametrize("path_name", sorted(paths.PATHS))
LEVELS = np.array([-20.0, -9.0, -2.0, 0.0, 1.3, 6.0, 20.0])


def test_every_output_is_in_the_zoo():
    assert {type(make()) for make in ZOO.values()} == set(outputs.Output.__subclasses__())


@every_path
def test_determinant_and_weights_follow_from_the_coefficients(path_name):
    @jax.jit
    def measure():
        path, step = paths.by_name(path_name), 1e-3
        data, noise = (
            jnp.stack(parts)
            for parts in zip(*(make().coefficients(path, LEVELS) for make in ZOO.values()))
        )
        inner = jnp.asarray([-3.0, 0.0, 1.3, 4.0])
        moved = -step * jnp.exp(inner / 2)  # x0 is moved and x held, eps giving way

        def change(output):
            there = output.target(path, inner, 0.4 + step, 0.2 + moved)
            return (there - output.target(path, inner, 0.4, 0.2)) / step

        return (
            data * path.sigma(LEVELS)[None] - noise * path.alpha(LEVELS)[None],
            jnp.stack([make().log_determinant(path, LEVELS) for make in ZOO.values()]),
            jnp.stack([make().log_eps_weight(path, LEVELS) for make in ZOO.values()]),
            path.log_alpha(LEVELS),
            jnp.stack([change(make()) for make in ZOO.values()]),
            jnp.stack([make().log_eps_weight(path, inner) + inner for make in ZOO.values()]),
        )

    with jax.enable_x64():
        determinant, log_size, weight, log_alpha, change, x0_weight = map(np.asarray, measure())
    signs = np.array([[make().sign] for make in ZOO.values()])
    np.testing.assert_array_equal(np.sign(determinant), np.broadcast_to(signs, determinant.shape))
    np.testing.assert_allclose(log_size, np.log(np.abs(determinant)), rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(weight, 2 * (log_size - log_alpha), atol=1e-11)
    np.testing.assert_allclose(x0_weight, 2 * np.log(np.abs(change)), atol=1e-9)


@functools.cache
def all_conversions(path_name, bits, level_bound):
    """Every output of one example as every other, [from, to, levels], and the targets."""

    @jax.jit
    def measure(levels, x0, eps):
        path = paths.by_name(path_name)
        x = path.alpha(levels) * x0 + path.sigma(levels) * eps
        kinds = [make() for make in ZOO.values()]
        targets = [kind.target(path, levels, x0, eps) for kind in kinds]
        table = [
            [outputs.convert(y, x, path, levels, source, kind) for kind in kinds]
            for y, source in zip(targets, kinds)
        ]
        return jnp.stack([jnp.stack(row) for row in table]), jnp.stack(targets)

    with jax.enable_x64(bits == 64):
        levels = jnp.asarray(LEVELS[np.abs(LEVELS) <= level_bound])
        return jax.tree.map(np.asarray, measure(levels, jnp.asarray(-0.4), jnp.asarray(0.9)))


@every_path
def test_every_output_becomes_every_other(path_name):
    table, targets = all_conversions(path_name, 64, 9.0)
    np.testing.assert_allclose(table, np.broadcast_to(targets, table.shape), rtol=2e-11)


@pytest.mark.parametrize("path_name", ["vp", "flow"])
def test_bounded_outputs_convert_at_all_levels_in_float32(path_name):
    """v, flow velocity and F on the two bounded paths; x0 and eps lie within reach of each."""
    bounded = [list(ZOO).index(name) for name in ("v", "flow", "edm", "edm_wide")]
    table, _ = all_conversions(path_name, 32, 20.0)
    _, targets = all_conversions(path_name, 64, 20.0)
    block = table[np.ix_(bounded, bounded)]
    assert block.dtype == np.float32
    expected = np.broadcast_to(targets[bounded], block.shape)
    np.testing.assert_allclose(block, expected, rtol=1e-5, atol=2e-6)


def test_converting_to_itself_changes_nothing():
    y, x = jnp.float32([0.3]), jnp.float32([5e3])
    for make in ZOO.values():
        for level in (-20.0, 20.0):
            output, level = make(), jnp.float32([level])
            assert outputs.convert(y, x, paths.vp(), level, output, output) == y


WORKED = {
    "vp": (-0.4, 2.2788152101, 2.2052207966, 2.6788152101, -4.9241904728, -2.1539944926),
    "ve": (-0.4, 2.1070949119, 2.3159132226, 2.5070949119, -4.0362263344, -2.0352166922),
    "flow": (-0.4, 2.8070949119, 1.9814865418, 3.2070949119, -8.1841998266, -2.5194020863),
}


@pytest.mark.parametrize("path_name", WORKED)
def test_worked_conversion(path_name):
    """logSNR 1.3, x = 0.7, x0 = -0.4, from section 3 of the specification."""

    @jax.jit
    def measure(x0, x):
        path, kinds = paths.by_name(path_name), [make() for make in outputs.OUTPUTS.values()]
        values = [outputs.convert(x0, x, path, 1.3, outputs.x0(), kind) for kind in kinds]
        return values, [kind.to_x0(path, 1.3, y, x) for kind, y in zip(kinds, values)]

    with jax.enable_x64():
        values, back = measure(jnp.asarray(-0.4), jnp.asarray(0.7))
    assert list(outputs.OUTPUTS) == ["x0", "eps", "v", "flow", "score", "edm"]
    np.testing.assert_allclose(values, WORKED[path_name], atol=1e-9)
    np.testing.assert_allclose(back, -0.4, rtol=1e-12)


def test_implied_weights_of_the_specification():
    expected = {
        ("eps", "vp"): 3.669296667619,
        ("v", "vp"): 4.669296667619,
        ("flow", "vp"): 8.500378325647,
        ("score", "vp"): 17.133034702621,
        ("edm", "vp"): 7.669296667619,
        ("v", "ve"): 5.941828460653,
        ("score", "ve"): 13.463738035002,
        ("v", "flow"): 2.564866001841,
        ("score", "flow"): 31.190409863800,
    }
    with jax.enable_x64():
        weights = [
            np.exp(ZOO[name]().log_eps_weight(paths.by_name(path_name), 1.3) + 1.3)
            for name, path_name in expected
        ]
    np.testing.assert_allclose(weights, list(expected.values()), rtol=1e-11)


@every_path
def test_edm_output_is_minus_v_of_standardised_data(path_name):
    """At any sigma_data: v of x0 / sigma_data at the level lambda + 2 log sigma_data."""
    with jax.enable_x64():
        path, x0, eps, sigma_data = paths.by_name(path_name), 0.4, -0.7, 1.7
        f = outputs.edm(sigma_data).target(path, LEVELS, x0, eps)
        shifted = LEVELS + 2 * np.log(sigma_data)
        v = outputs.v().target(paths.vp(), shifted, x0 / sigma_data, eps)
        np.testing.assert_allclose(f, -v, rtol=1e-12)


def test_edm_preconditioning():
    with jax.enable_x64():
        got = gaussian.edm_preconditioning(1.3, 0.5)
        expected = (0.4784397874594533, 0.3610956287953880, 1.3833868402720235, -0.1625)
        np.testing.assert_allclose(got, expected, rtol=1e-14)
        # D = c_skip x / alpha + c_out F
        path, x, f = paths.flow(), 0.7, -0.3
        by_hand = got.skip * x / path.alpha(1.3) + got.out * f
        np.testing.assert_allclose(outputs.edm().to_x0(path, 1.3, f, x), by_hand, rtol=1e-12)


@every_path
def test_gradients_are_finite_at_extreme_levels_in_float32(path_name):
    path = paths.by_name(path_name)

    def total(levels, y):
        def one(output):
            target = output.target(path, levels, 0.3, -0.8)
            return jnp.sum(target + output.log_eps_weight(path, levels) + y * target)

        return jnp.stack([one(make()) for make in ZOO.values()])

    gradients = jax.jit(jax.jacrev(total, (0, 1)))(jnp.float32([-20.0, 20.0]), jnp.ones(2))
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


def test_bad_arguments():
    with pytest.raises(ValueError, match="unknown output 'epsilon'; did you mean eps"):
        outputs.by_name("epsilon")
    with pytest.raises(ValueError, match="edm needs sigma_data > 0, got -1.0"):
        outputs.by_name("edm", sigma_data=-1.0)
    with pytest.raises(ValueError, match="finite sigma_data"):
        gaussian.edm_preconditioning(0.0, float("inf"))


def test_sigma_data_may_be_traced():
    gradient = jax.grad(lambda s: outputs.edm(s).log_eps_weight(paths.vp(), 0.0))(0.5)
    np.testing.assert_allclose(gradient, -2 / 0.5**3 / (1 + 1 / 0.5**2), rtol=1e-5)
