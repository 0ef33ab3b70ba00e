"""The curves behind the named weightings; the factories are in ``weightings.py``.

Classes are frozen pytrees and check nothing.
"""

import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules.coordinates import as_float
from mdm_jax.schedules.laws import Law
from mdm_jax.schedules.parameterisations import Output
from mdm_jax.schedules.paths import Path
from mdm_jax.typing import Array, ArrayLike


@runtime_checkable
class Weighting(Protocol):
    """An effective weight over the logSNR. Methods are elementwise and jit-able."""

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        """(low, high) logSNR between which the weight is positive; either may be infinite."""

    def log_weight(self, logsnr: ArrayLike) -> Array:
        """log W, the factor of the eps error in dlambda; -inf where the weight is zero."""


@pytree_dataclass
class Elbo:
    """``W = 1/2``."""

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return -jnp.inf, jnp.inf

    def log_weight(self, logsnr: ArrayLike) -> Array:
        return jnp.full_like(as_float(logsnr), -math.log(2.0))


@pytree_dataclass
class Sigmoid:
    """``W = sigmoid(bias - lambda)``."""

    bias: ArrayLike

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return -jnp.inf, jnp.inf

    def log_weight(self, logsnr: ArrayLike) -> Array:
        return jax.nn.log_sigmoid(self.bias - as_float(logsnr))


@pytree_dataclass
class MinSnr:
    """``min(1, gamma exp(-lambda))``."""

    log_gamma: ArrayLike

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return -jnp.inf, jnp.inf

    def log_weight(self, logsnr: ArrayLike) -> Array:
        return jnp.minimum(0.0, self.log_gamma - as_float(logsnr))


@pytree_dataclass
class TruncatedSnr:
    """``max(1, exp(-lambda))``."""

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return -jnp.inf, jnp.inf

    def log_weight(self, logsnr: ArrayLike) -> Array:
        return jnp.maximum(0.0, -as_float(logsnr))


@pytree_dataclass
class P2:
    """``(k + exp(lambda))^-gamma``."""

    log_k: ArrayLike
    gamma: ArrayLike

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return -jnp.inf, jnp.inf

    def log_weight(self, logsnr: ArrayLike) -> Array:
        logsnr = as_float(logsnr)
        return -self.gamma * jnp.logaddexp(jnp.asarray(self.log_k, logsnr.dtype), logsnr)


@pytree_dataclass
class OutputFactor:
    """``c`` with ``|dy|^2 = c |deps|^2``: unit weight on the error of a network's own output."""

    output: Output
    path: Path

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return -jnp.inf, jnp.inf

    def log_weight(self, logsnr: ArrayLike) -> Array:
        return self.output.log_eps_weight(self.path, logsnr)


@pytree_dataclass
class Product:
    """The density of a law times any number of factors."""

    law: Law
    factors: tuple[Weighting, ...]

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return self.law.support

    def log_weight(self, logsnr: ArrayLike) -> Array:
        # The law first: outside of its support the sum is -inf, and the factors are finite.
        return self.law.log_pdf(logsnr) + sum(f.log_weight(logsnr) for f in self.factors)


@pytree_dataclass
class FlatBelow:
    """``base``, constant at its value at ``peak`` for all noisier levels."""

    base: Weighting
    peak: ArrayLike

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return -jnp.inf, self.base.support[1]

    def log_weight(self, logsnr: ArrayLike) -> Array:
        return self.base.log_weight(jnp.maximum(as_float(logsnr), self.peak))
