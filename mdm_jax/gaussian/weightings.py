"""Weightings of Gaussian diffusion: what is minimised, whatever law the levels are drawn from.

With l the squared error of the predicted noise, summed over the elements of a row, the loss is

    int W(lambda) E[l | lambda] dlambda = E_{lambda ~ p} [ W(lambda) / p(lambda) l ] .

The *effective weight* W is the objective; the law p only sets the variance of its estimate. Drawing
from p with explicit weight w on the error of an output y, ``|dy|^2 = c |deps|^2``, has W = p w c.
``W = 1/2`` is the evidence lower bound; a W that never rises with the logSNR is the bound of data
with added noise (Kingma and Gao 2023). Weightings are frozen pytrees; constants are kept.
"""

import abc
import math

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.checks import as_parameter, check_finite, is_concrete
from mdm_jax.gaussian import parameterisations, schedules
from mdm_jax.gaussian.parameterisations import Output, check_sigma_data
from mdm_jax.gaussian.paths import Path, flow, vp
from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules.coordinates import as_float
from mdm_jax.schedules.laws import Law, logistic
from mdm_jax.types import Array, ArrayLike


class Weighting(abc.ABC):
    """An effective weight over the logSNR. Methods are elementwise and jit-able."""

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        """(low, high) logSNR between which the weight is positive; either may be infinite."""
        return -jnp.inf, jnp.inf

    @abc.abstractmethod
    def log_weight(self, logsnr: ArrayLike) -> Array:
        """log W, the factor of the eps error in dlambda; -inf where the weight is zero."""


@pytree_dataclass
class Elbo(Weighting):
    """``W = 1/2``."""

    def log_weight(self, logsnr: ArrayLike) -> Array:
        return jnp.full_like(as_float(logsnr), -math.log(2.0))


@pytree_dataclass
class Sigmoid(Weighting):
    """``W = sigmoid(bias - lambda)``."""

    bias: ArrayLike

    def log_weight(self, logsnr: ArrayLike) -> Array:
        return jax.nn.log_sigmoid(self.bias - as_float(logsnr))


@pytree_dataclass
class MinSnr(Weighting):
    """``min(1, gamma exp(-lambda))``."""

    log_gamma: ArrayLike

    def log_weight(self, logsnr: ArrayLike) -> Array:
        return jnp.minimum(0.0, self.log_gamma - as_float(logsnr))


@pytree_dataclass
class TruncatedSnr(Weighting):
    """``max(1, exp(-lambda))``."""

    def log_weight(self, logsnr: ArrayLike) -> Array:
        return jnp.maximum(0.0, -as_float(logsnr))


@pytree_dataclass
class P2(Weighting):
    """``(k + exp(lambda))^-gamma``."""

    log_k: ArrayLike
    gamma: ArrayLike

    def log_weight(self, logsnr: ArrayLike) -> Array:
        logsnr = as_float(logsnr)
        return -self.gamma * jnp.logaddexp(jnp.asarray(self.log_k, logsnr.dtype), logsnr)


@pytree_dataclass
class OutputFactor(Weighting):
    """``c`` with ``|dy|^2 = c |deps|^2``: unit weight on the error of a network's own output."""

    output: Output
    path: Path

    def log_weight(self, logsnr: ArrayLike) -> Array:
        return self.output.log_eps_weight(self.path, logsnr)


@pytree_dataclass
class Product(Weighting):
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
class FlatBelow(Weighting):
    """``base``, constant at its value at ``peak`` for all noisier levels."""

    base: Weighting
    peak: ArrayLike

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return -jnp.inf, self.base.support[1]

    def log_weight(self, logsnr: ArrayLike) -> Array:
        return self.base.log_weight(jnp.maximum(as_float(logsnr), self.peak))


def elbo() -> Elbo:
    """The evidence lower bound, ``W = 1/2``, nats (Kingma et al. 2021, VDM)."""
    return Elbo()


def from_law(law: Law) -> Product:
    """``W = p``: eps error, unit weight, levels drawn from ``law`` (DDPM's "simple" loss)."""
    return Product(law, ())


def from_recipe(
    law: Law, output: Output, path: Path | None = None, explicit: Weighting | None = None
) -> Product:
    """The effective weight of a recipe, ``W = p w c``.

    Args:
        law: p, of the levels.
        output: whose squared error is taken.
        path: of the noisy input, variance-preserving if not given. It matters for v and score only.
        explicit: w, the factor on that squared error as a function of the level; default 1.
    """
    factor = OutputFactor(output, vp() if path is None else path)
    return Product(law, (factor,) if explicit is None else (factor, explicit))


def sigmoid(bias: ArrayLike = 2.0) -> Sigmoid:
    """``W = sigmoid(bias - lambda)`` in dlambda, with no law in it (Hoogeboom et al. 2024, SiD2).

    Raises:
        ValueError: if the bias is not finite.
    """
    bias = as_parameter(bias, "bias")
    check_finite("sigmoid", bias=bias)
    return Sigmoid(bias)


def v_mse(law: Law | None = None) -> Product:
    """``W = p (1 + exp(-lambda))``: error of v on the vp path, "SNR + 1" (Salimans and Ho 2022).

    Under the cosine law, the default, W = exp(-lambda / 2) / pi.
    """
    return from_recipe(schedules.cosine() if law is None else law, parameterisations.v())


def x0_mse(law: Law | None = None) -> Product:
    """``W = p exp(-lambda)``: error of the clean data, cosine law if none is given."""
    return from_recipe(schedules.cosine() if law is None else law, parameterisations.x0())


def flow_mse(law: Law | None = None) -> Product:
    """``W = p (1 + exp(-lambda / 2))^2``: error of the flow velocity (Liu et al., Lipman et al.).

    Under uniform flow time, the default, W = exp(-lambda / 2) / 2.
    """
    return from_recipe(logistic(0.0, 2.0) if law is None else law, parameterisations.flow(), flow())


def indi() -> Product:
    """Error of the clean data at uniform flow time (Delbracio and Milanfar 2023, InDI)."""
    return x0_mse(logistic(0.0, 2.0))


def sd3(mean: ArrayLike = 0.0, std: ArrayLike = 1.0) -> Product:
    """Flow velocity at logit-normal flow times (Esser et al. 2024, Stable Diffusion 3).

    ``mean`` and ``std`` are those of the logit of the flow time; a positive mean is noisier.
    """
    return flow_mse(schedules.lognormal(mean, std))


def edm(mean: ArrayLike = -1.2, std: ArrayLike = 1.2, sigma_data: ArrayLike = 0.5) -> Product:
    """``N(lambda; -2 mean, 4 std^2) (1 + exp(-lambda) / sigma_data^2)`` (Karras et al. 2022).

    ``mean`` and ``std`` are those of log sigma, ``sigma_data`` the standard deviation of the data.
    """
    return from_recipe(schedules.lognormal(mean, std), parameterisations.edm(sigma_data))


def edm2(mean: ArrayLike = -0.4, std: ArrayLike = 1.0, sigma_data: ArrayLike = 0.5) -> Product:
    """:func:`edm` with the law of Karras et al. 2024, without their learned exp(-u(lambda))."""
    return edm(mean, std, sigma_data)


def edm_monotonic(
    mean: ArrayLike = -1.2, std: ArrayLike = 1.2, sigma_data: ArrayLike = 0.5
) -> FlatBelow:
    """:func:`edm`, held at its maximum for noisier levels (Kingma and Gao 2023).

    Raises:
        TypeError: for traced parameters; the maximum is searched for when the weighting is built.
    """
    mean, std = as_parameter(mean, "mean"), as_parameter(std, "std")
    sigma_data = check_sigma_data("edm_monotonic", sigma_data)
    if not is_concrete(mean, std, sigma_data):
        raise TypeError("edm_monotonic needs known parameters; build it outside jit")
    # Where the weight peaks, lambda = -2 mean - 4 std^2 sigmoid(-lambda - 2 log sigma_data).
    low, high = -2 * mean - 4 * std**2, -2 * mean
    for _ in range(8):  # the window shrinks by 32 each time
        levels = np.linspace(low, high, 65)
        excess = np.exp(-levels) / sigma_data**2
        peak = int(np.argmax(np.log1p(excess) - (levels + 2 * mean) ** 2 / (8 * std**2)))
        low, high = levels[max(peak - 1, 0)], levels[min(peak + 1, 64)]
    return FlatBelow(edm(mean, std, sigma_data), float((low + high) / 2))


def min_snr(law: Law, gamma: ArrayLike = 5.0) -> Product:
    """``p min(1, gamma exp(-lambda))`` (Hang et al. 2023): factor min(SNR, gamma) on x0's error.

    Raises:
        ValueError: unless gamma > 0.
    """
    return Product(law, (MinSnr(_log_positive("min_snr", "gamma", gamma)),))


def soft_min_snr(law: Law, gamma: ArrayLike = 5.0) -> Product:
    """``p gamma / (gamma + exp(lambda))`` (Crowson et al. 2024), a smooth :func:`min_snr`.

    Raises:
        ValueError: unless gamma > 0.
    """
    return Product(law, (Sigmoid(_log_positive("soft_min_snr", "gamma", gamma)),))


def p2(law: Law, k: ArrayLike = 1.0, gamma: ArrayLike = 1.0) -> Product:
    """``p / (k + exp(lambda))^gamma`` (Choi et al. 2022).

    Raises:
        ValueError: unless k > 0 and gamma is finite.
    """
    gamma = as_parameter(gamma, "gamma")
    check_finite("p2", gamma=gamma)
    return Product(law, (P2(_log_positive("p2", "k", k), gamma),))


def truncated_snr(law: Law) -> Product:
    """``p max(1, exp(-lambda))``: factor max(SNR, 1) on x0's error (Salimans and Ho 2022)."""
    return Product(law, (TruncatedSnr(),))


def _log_positive(name: str, what: str, value: ArrayLike) -> ArrayLike:
    value = as_parameter(value, what)
    check_finite(name, **{what: value})
    if not is_concrete(value):
        return jnp.log(value)
    if not value > 0:
        raise ValueError(f"{name} needs {what} > 0, got {value}")
    return math.log(value)
