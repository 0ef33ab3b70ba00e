"""Products with narrow operands: equal to einsum in float32, and narrow in both passes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from variants import slow_except

from mdm_jax.models.products import product
from mdm_jax.training import compiler_options

pytestmark = pytest.mark.keyless

SPECS = {
    "...i,io->...o": ((3, 5, 7), (7, 4)),
    "nqhd,nkhd->nhqk": ((2, 5, 3, 4), (2, 6, 3, 4)),
    "nhqk,nhkd->nhqd": ((2, 3, 5, 6), (2, 3, 6, 4)),
    "nld,kd->nlk": ((2, 5, 4), (6, 4)),
    "abij,bjia->ab": ((2, 3, 4, 5), (3, 5, 4, 2)),
    "ij,jik->k": ((4, 5), (5, 4, 3)),
    # Summed over leading axes, with the smaller operand on the left and on the right.
    "gcd,gck->gdk": ((2, 5, 3), (2, 5, 4)),
    "cnhd,hck->dkn": ((3, 2, 4, 5), (4, 3, 2)),
}
FEW = ("...i,io->...o", "nqhd,nkhd->nhqk", "cnhd,hck->dkn")
"""A dense layer, attention's scores, and a sum over leading axes of all kinds."""


def plain(spec, left, right):
    return jnp.einsum(
        spec, left, right, preferred_element_type=jnp.promote_types("float32", left.dtype)
    )


def operands(spec, seed=0, integers=False):
    rng = np.random.default_rng(seed)
    shapes = SPECS[spec]
    if integers:
        return [jnp.asarray(rng.integers(-9, 10, shape), jnp.float32) for shape in shapes]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def both_passes(function, left, right, cotangent):
    out, pull = jax.vjp(function, left, right)
    return out, *pull(cotangent(out))


def compiled_passes(function, left, right, cotangent):
    run = tiny.jit(lambda left, right: both_passes(function, left, right, cotangent))
    return jax.device_get(run(left, right))


@pytest.mark.parametrize("spec", slow_except(FEW, SPECS))
def test_in_float32_it_is_einsum(spec):
    """With integers no sum is rounded, so any order of summation gives the same bits."""
    left, right = operands(spec, integers=True)
    cotangent = lambda out: jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape) - 3  # noqa: E731
    result = compiled_passes(lambda a, b: product(spec, a, b), left, right, cotangent)
    expected = compiled_passes(lambda a, b: plain(spec, a, b), left, right, cotangent)
    for one, other in zip(result, expected):
        assert one.dtype == other.dtype == jnp.float32
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("spec", ["...i,io->...o", "abij,bjia->ab"])
def test_forward_mode_and_vmap_are_those_of_einsum(spec):
    left, right = operands(spec)
    ours, theirs = (lambda a, b, f=f: f(spec, a, b) for f in (product, plain))
    tangents = operands(spec, seed=1)

    @tiny.jit
    def run(left, right):
        both = [
            [jax.jvp(f, (left, right), tuple(tangents))[1] for f in (ours, theirs)],
        ]
        for axes in [(0, None), (None, 1), (1, 0)]:
            pair = [
                x if axis is None else jnp.stack([x, 2 * x, x - 1], axis)
                for x, axis in zip((left, right), axes)
            ]
            both.append([jax.vmap(f, axes)(*pair) for f in (ours, theirs)])
        return both

    forward, *mapped = run(left, right)
    np.testing.assert_allclose(*forward, rtol=1e-6, atol=1e-6)
    for result, expected in mapped:
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", slow_except(FEW, SPECS))
def test_bfloat16_gradients_are_within_the_operands_rounding(spec):
    """Against float64. Rounding an operand errs by 2^-8 of it, so a sum of products of two by at
    most (2^-7 + 2^-16) of the sum of absolute products; sums in float32 add next to nothing."""
    left, right = operands(spec)
    shape = jax.eval_shape(functools.partial(plain, spec), left, right).shape
    cotangent = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    # Not compiled as a whole: under the tests' flags the CPU lacks some products of bfloat16.
    result = both_passes(
        lambda a, b: product(spec, a, b, jnp.bfloat16), left, right, lambda _: cotangent
    )
    with jax.enable_x64():
        wide = [np.asarray(x, np.float64) for x in (left, right, cotangent)]
        exact = compiled_passes(lambda a, b: plain(spec, a, b), *wide[:2], lambda _: wide[2])
        sizes = compiled_passes(
            lambda a, b: plain(spec, a, b), *map(np.abs, wide[:2]), lambda _: np.abs(wide[2])
        )
    for one, other, size in zip(result, exact, sizes):
        assert one.dtype == jnp.float32  # float32 weights get float32 gradients
        assert np.all(np.abs(one - other) <= (2**-7 + 2**-15) * size)
        assert np.abs(one - other).max() > 1e-5  # it was rounded at all


def test_every_product_of_both_passes_is_narrow():
    """Operands bfloat16, results float32: what units that multiply bfloat16 do natively."""
    x, w = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((8, 6))
    loss = lambda x, w: jnp.sum(product("ti,io->to", x, w, jnp.bfloat16) ** 2)  # noqa: E731
    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, w).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(lines) == 3
    for line in lines:
        operands, result = line.split(" : ")[-1].split("->")
        assert operands.count("xbf16>") == 2 and result.count("xf32>") == 1


def test_gradients_of_weights_accumulate_in_float32():
    """A sum of 4097 ones; bfloat16 sums stall at 256."""
    x = jnp.ones((4097, 1), jnp.bfloat16)
    total = jax.grad(lambda w: jnp.sum(product("ti,io->to", x, w, jnp.bfloat16)))(jnp.ones((1, 2)))
    np.testing.assert_array_equal(total, 4097.0)


def test_in_float64_it_is_einsum():
    with jax.enable_x64():
        left, right = (jnp.asarray(np.asarray(x), jnp.float64) / 3 for x in operands("nld,kd->nlk"))
        out = product("nld,kd->nlk", left, right)
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(out, plain("nld,kd->nlk", left, right), rtol=1e-14)


@pytest.mark.parametrize("spec", ["ij,jk->i", "ii,ij->j", "ij,jk->ikm"])
def test_other_products_are_refused(spec):
    with pytest.raises(ValueError, match="sums over letters that both operands have"):
        product(spec, jnp.ones((2, 2)), jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="two operands and a result"):
        product("ij->i", jnp.ones((2, 2)), jnp.ones((2, 2)))


def test_on_a_cpu_products_of_transposed_batches_stay_narrow():
    """Their operands are bfloat16 in the compiled program, as those of batches in order."""

    def narrow(transposed: bool) -> bool:
        shape = (2, 64, 4, 32) if transposed else (2, 4, 64, 32)
        x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        order = (lambda x: jnp.swapaxes(x, 1, 2)) if transposed else (lambda x: x)
        scores = lambda q, k: product("nhqd,nhkd->nhqk", order(q), order(k))  # noqa: E731
        compiled = jax.jit(scores).lower(x, x).compile(compiler_options=compiler_options("cpu"))
        return not re.search(r"= f32\[2,(64,4|4,64),32\]", compiled.as_text())

    if not narrow(transposed=False):
        pytest.skip("this CPU's library has no products of bfloat16")
    assert narrow(transposed=True)
