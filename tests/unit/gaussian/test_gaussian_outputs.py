"""Output parameterisations: conversions, implied weights and EDM's preconditioning."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax import gaussian
from mdm_jax.gaussian import parameterisations as outputs
from mdm_jax.gaussian import paths

pytestmark = pytest.mark.keyless

# Factories, so that an output is built in the precision of the test.
ZOO = outputs.OUTPUTS | {"edm_wide": lambda: outputs.edm(1.7)}
every_path = pytest.mark.parametrize("path_name", sorted(paths.PATHS))
LEVELS = np.array([-20.0, -9.0, -2.0, 0.0, 1.3, 6.0, 20.0])


def test_every_output_is_in_the_zoo():
    assert {type(make()) for make in ZOO.values()} == set(outputs.Output.__subclasses__())


@every_path
def test_determinant_and_weights_follow_from_the_coefficients(path_name):
    with jax.enable_x64():
        path, step = paths.by_name(path_name), 1e-3
        alpha, sigma = np.asarray(path.alpha(LEVELS)), np.asarray(path.sigma(LEVELS))
        for name, make in ZOO.items():
            output = make()
            data, noise = map(np.asarray, output.coefficients(path, LEVELS))
            determinant = data * sigma - noise * alpha
            np.testing.assert_array_equal(np.sign(determinant), output.sign)
            log_size = np.log(np.abs(determinant))
            got = output.log_determinant(path, LEVELS)
            np.testing.assert_allclose(got, log_size, rtol=1e-11, atol=1e-11, err_msg=name)
            weight = np.asarray(output.log_eps_weight(path, LEVELS))
            np.testing.assert_allclose(weight, 2 * (log_size - np.log(alpha)), atol=1e-11)
            # |dy|^2 / |dx0|^2 when x0 is moved and x held, eps giving way.
            change = (data - noise * np.exp(LEVELS / 2)) * step
            there = output.target(path, LEVELS, 0.4 + step, 0.2 - step * np.exp(LEVELS / 2))
            moved = np.asarray(there) - np.asarray(output.target(path, LEVELS, 0.4, 0.2))
            inner = np.abs(LEVELS) < 5
            np.testing.assert_allclose(moved[inner], change[inner], rtol=1e-9)
            x0_weight = 2 * np.log(np.abs(moved) / step)
            np.testing.assert_allclose((weight + LEVELS)[inner], x0_weight[inner], atol=1e-9)


@functools.cache
def all_conversions(path_name, bits, level_bound):
    """Every output of one example as every other, [from, to, levels], and the targets."""
    with jax.enable_x64(bits == 64):
        path, levels = paths.by_name(path_name), jnp.asarray(LEVELS)
        x0, eps = jnp.full_like(levels, -0.4), jnp.full_like(levels, 0.9)
        x = path.alpha(levels) * x0 + path.sigma(levels) * eps
        kinds = [make() for make in ZOO.values()]
        targets = [kind.target(path, levels, x0, eps) for kind in kinds]
        table = [
            [outputs.convert(y, x, path, levels, source, kind) for kind in kinds]
            for y, source in zip(targets, kinds)
        ]
    inside = np.abs(LEVELS) <= level_bound
    return np.asarray(table)[..., inside], np.asarray(targets)[..., inside]


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
    levels = jnp.asarray(LEVELS, jnp.float32)
    y, x = jnp.full_like(levels, 0.3), jnp.full_like(levels, 5e3)
    for make in ZOO.values():
        got = outputs.convert(y, x, paths.vp(), levels, make(), make())
        np.testing.assert_array_equal(got, y)


WORKED = {
    "vp": (-0.4, 2.2788152101, 2.2052207966, 2.6788152101, -4.9241904728, -2.1539944926),
    "ve": (-0.4, 2.1070949119, 2.3159132226, 2.5070949119, -4.0362263344, -2.0352166922),
    "flow": (-0.4, 2.8070949119, 1.9814865418, 3.2070949119, -8.1841998266, -2.5194020863),
}


@pytest.mark.parametrize("path_name", WORKED)
def test_worked_conversion(path_name):
    """logSNR 1.3, x = 0.7, x0 = -0.4, from section 3 of the specification."""
    assert list(outputs.OUTPUTS) == ["x0", "eps", "v", "flow", "score", "edm"]
    with jax.enable_x64():
        path, level = paths.by_name(path_name), jnp.full(7, 1.3)
        x0, x = jnp.full(7, -0.4), jnp.full(7, 0.7)
        for make, expected in zip(outputs.OUTPUTS.values(), WORKED[path_name]):
            y = outputs.convert(x0, x, path, level, outputs.x0(), make())
            np.testing.assert_allclose(y, expected, atol=1e-9)
            np.testing.assert_allclose(make().to_x0(path, level, y, x), -0.4, rtol=1e-12)


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
            np.exp(ZOO[name]().log_eps_weight(paths.by_name(path_name), LEVELS)[4] + 1.3)
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
    """D = c_skip x / alpha + c_out F(c_in x / alpha), table 1 of Karras et al. at logSNR 1.3."""
    with jax.enable_x64():
        path, output, levels = paths.flow(), outputs.edm(0.5), jnp.full((1, 7), 1.3)
        zero, alpha = jnp.zeros_like(levels), path.alpha(levels)
        c_skip = output.to_x0(path, levels, zero, alpha)
        c_out = output.to_x0(path, levels, zero + 1, zero)
        c_in = gaussian.precondition(lambda x, *_: x, path, 0.5)(alpha, levels)
        np.testing.assert_allclose(c_skip, 0.4784397874594533, rtol=1e-13)
        np.testing.assert_allclose(c_out, 0.3610956287953880, rtol=1e-13)
        np.testing.assert_allclose(c_in, 1.3833868402720235, rtol=1e-13)


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
    with pytest.raises(ValueError, match="unknown output 'epsilon'; did you mean 'eps'"):
        outputs.by_name("epsilon")
    with pytest.raises(ValueError, match="edm needs sigma_data > 0, got -1.0"):
        outputs.by_name("edm", sigma_data=-1.0)
    with pytest.raises(ValueError, match="finite sigma_data"):
        outputs.edm(float("inf"))


def test_sigma_data_may_be_traced():
    gradient = jax.grad(lambda s: outputs.edm(s).log_eps_weight(paths.vp(), 0.0))(0.5)
    np.testing.assert_allclose(gradient, -2 / 0.5**3 / (1 + 1 / 0.5**2), rtol=1e-5)
