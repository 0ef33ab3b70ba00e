"""Einsum of two operands in bfloat16 with float32 accumulation, forward *and* backward.

``jnp.einsum`` with ``preferred_element_type=float32`` multiplies a float32 cotangent in its
backward pass. Here the cotangent is rounded to the operands' dtype first; sums stay float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mdm_jax.types import Array

Dimensions = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]


def product(
    spec: str,
    left: Array,
    right: Array,
    dtype: jnp.dtype | None = None,
    out_dtype: jnp.dtype | None = None,
) -> Array:
    """``einsum(spec, left, right)`` with operands rounded to ``dtype`` (default: that of ``left``).

    The result is float32, or float64 if ``dtype`` is, and rounded to ``out_dtype`` if that is
    given: what rematerialisation keeps of it is then as narrow. Gradients have the dtype of their
    operand.
    Supports forward and reverse mode, ``vmap``, ``scan`` and sharding. In the spec, such as
    "nhqd,nhkd->nhqk", each letter occurs once in two or all of the three terms, else ValueError;
    "..." stands for leading axes of ``left`` and the result.
    """
    dtype = jnp.dtype(left.dtype if dtype is None else dtype)
    a, b, out = _letters(spec, left.ndim)
    shared = [x for x in a if x in b]
    batch = [x for x in shared if x in out]
    summed = [x for x in shared if x not in out]
    free = [x for x in a if x not in b] + [x for x in b if x not in a]
    if sorted(out) != sorted(batch + free) or any(len(set(x)) < len(x) for x in (a, b, out)):
        raise ValueError(
            f"a product sums over letters that both operands have and keeps the others, got {spec}"
        )
    dimensions = tuple(
        tuple(tuple(term.index(x) for x in letters) for term in (a, b))
        for letters in (summed, batch)
    )
    out_dtype = _wide(dtype) if out_dtype is None else jnp.dtype(out_dtype)
    result = product_p.bind(left, right, dimensions=dimensions, dtype=dtype, out_dtype=out_dtype)
    order = [(batch + free).index(letter) for letter in out]
    return result if order == sorted(order) else jnp.transpose(result, order)


def _letters(spec: str, ndim: int) -> tuple[str, str, str]:
    operands, arrow, out = spec.replace(" ", "").partition("->")
    a, comma, b = operands.partition(",")
    if not (arrow and comma) or "," in b:
        raise ValueError(f"a product needs two operands and a result, got {spec!r}")
    if a.startswith("..."):
        leading = "".join(chr(ord("A") + i) for i in range(ndim - len(a) + 3))
        a, out = a.replace("...", leading), out.replace("...", leading)
    return a, b, out


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _multiply(left: Array, right: Array, *, dimensions: Dimensions, dtype, out_dtype) -> Array:
    left, right = left.astype(dtype), right.astype(dtype)
    y = lax.dot_general(left, right, dimensions, preferred_element_type=_wide(dtype))
    return y.astype(out_dtype)


def _multiply_on_cpu(
    left: Array, right: Array, *, dimensions: Dimensions, dtype, out_dtype
) -> Array:
    # The CPU's fast kernels need the summed axes of the left operand last, as in a forward pass.
    # Gradients of weights, keys and values sum over leading axes: the smaller operand is transposed
    # and put first. The barriers keep the compiler from folding the transpose into the product.
    (left_sum, right_sum), (left_batch, right_batch) = dimensions
    dtypes = {"dtype": dtype, "out_dtype": out_dtype}
    multiply = functools.partial(_multiply, **dtypes)
    if left_batch and dtype.itemsize < 4:
        multiply = functools.partial(_multiply_reshaped, **dtypes)
    if set(left_sum) == set(range(left.ndim - len(left_sum), left.ndim)):
        return multiply(left, right, dimensions=dimensions)
    left_free = _free(left.ndim, left_sum, left_batch)
    right_free = _free(right.ndim, right_sum, right_batch)
    batch = tuple(range(len(left_batch)))

    def summed_last(x: Array, free: list[int], summed: tuple[int, ...], batches: tuple[int, ...]):
        x = jnp.transpose(x.astype(dtype), [*batches, *free, *summed])
        return lax.optimization_barrier(x), tuple(range(x.ndim - len(summed), x.ndim))

    if left.size <= right.size:
        left, last = summed_last(left, left_free, left_sum, left_batch)
        by_left = ((last, right_sum), (batch, right_batch))
        y = multiply(left, right, dimensions=by_left)
        # A transpose that the compiler folds into the result has no kernel for narrow operands.
        return y if dtype.itemsize >= 4 else lax.optimization_barrier(y)
    right, last = summed_last(right, right_free, right_sum, right_batch)
    by_right = ((last, left_sum), (batch, left_batch))
    y = multiply(right, left, dimensions=by_right)
    y = lax.optimization_barrier(y)
    split = len(batch) + len(right_free)
    return jnp.transpose(y, [*batch, *range(split, y.ndim), *range(len(batch), split)])


def _multiply_reshaped(left: Array, right: Array, *, dimensions: Dimensions, **dtypes) -> Array:
    # The kernels for narrow operands take batches in row-major order alone, and an array that was
    # transposed, or is the compiler's idea of one, has another until it is reshaped.
    summed, batches = (tuple(tuple(d + 1 for d in axes) for axes in pair) for pair in dimensions)
    batches = tuple((0, *axes) for axes in batches)
    return _multiply(left[None], right[None], dimensions=(summed, batches), **dtypes)[0]


def _shape(left, right, **options) -> jax.core.ShapedArray:
    multiply = functools.partial(_multiply, **options)
    out = jax.eval_shape(multiply, left, right)
    return jax.core.ShapedArray(out.shape, out.dtype)


def _free(ndim: int, *used: tuple[int, ...]) -> list[int]:
    return [axis for axis in range(ndim) if not any(axis in group for group in used)]


def _left_gradient(
    cotangent, left, right: Array, *, dimensions: Dimensions, dtype, out_dtype
) -> Array:
    del out_dtype
    (left_sum, right_sum), (left_batch, right_batch) = dimensions
    left_ndim, batch = len(left.aval.shape), tuple(range(len(left_batch)))
    left_free = _free(left_ndim, left_sum, left_batch)
    right_free = _free(right.ndim, right_sum, right_batch)
    last = tuple(range(cotangent.ndim - len(right_free), cotangent.ndim))
    back = ((last, tuple(right_free)), (batch, right_batch))
    result = product_p.bind(cotangent, right, dimensions=back, dtype=dtype, out_dtype=_wide(dtype))
    # Now [batch, free axes of left, summed axes in the order of right].
    summed = [left_sum[right_sum.index(axis)] for axis in sorted(right_sum)]
    order = np.argsort([*left_batch, *left_free, *summed])
    return jnp.transpose(result, order).astype(left.aval.dtype)


def _right_gradient(
    cotangent, left: Array, right, *, dimensions: Dimensions, dtype, out_dtype
) -> Array:
    del out_dtype
    (left_sum, right_sum), (left_batch, right_batch) = dimensions
    right_ndim, batch = len(right.aval.shape), tuple(range(len(left_batch)))
    left_free = _free(left.ndim, left_sum, left_batch)
    right_free = _free(right_ndim, right_sum, right_batch)
    middle = tuple(range(len(batch), len(batch) + len(left_free)))
    back = ((tuple(left_free), middle), (left_batch, batch))
    result = product_p.bind(left, cotangent, dimensions=back, dtype=dtype, out_dtype=_wide(dtype))
    # Now [batch, summed axes in the order of left, free axes of right].
    summed = [right_sum[left_sum.index(axis)] for axis in sorted(left_sum)]
    order = np.argsort([*right_batch, *summed, *right_free])
    return jnp.transpose(result, order).astype(right.aval.dtype)


def _batched(operands, axes, *, dimensions: Dimensions, **dtypes) -> tuple[Array, int]:
    # The new axis comes first; a free axis of one operand, or a batch axis of both.
    mapped = [axis is not None for axis in axes]
    left, right = (
        jnp.moveaxis(x, axis, 0) if is_mapped else x
        for x, axis, is_mapped in zip(operands, axes, mapped)
    )
    sums, (left_batch, right_batch) = (
        tuple(tuple(d + shift for d in axes) for axes, shift in zip(pair, mapped))
        for pair in dimensions
    )
    if all(mapped):
        batches, out_axis = ((0, *left_batch), (0, *right_batch)), 0
    else:
        batches, out_axis = (left_batch, right_batch), len(left_batch)
        if mapped[1]:
            out_axis += len(_free(left.ndim, sums[0], left_batch))
    return product_p.bind(left, right, dimensions=(sums, batches), **dtypes), out_axis


product_p = Primitive("product")
"""The bilinear primitive under :func:`product`; rematerialisation policies test for it."""

product_p.def_impl(_multiply)
product_p.def_abstract_eval(_shape)
ad.defbilinear(product_p, _left_gradient, _right_gradient)
batching.primitive_batchers[product_p] = _batched
mlir.register_lowering(product_p, mlir.lower_fun(_multiply, multiple_results=False))
mlir.register_lowering(
    product_p, mlir.lower_fun(_multiply_on_cpu, multiple_results=False), platform="cpu"
)
