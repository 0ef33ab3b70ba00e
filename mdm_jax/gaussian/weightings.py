"""Weightings of Gaussian diffusion: the objective, whatever law the levels are drawn from.

The loss is ``int W(lambda) E[l | lambda] dlambda = E_{lambda ~ p} [W(lambda) / p(lambda) l]``, with
l the squared error of the predicted noise, summed over the elements of a row. An explicit weight w
on the error of an output y, ``|dy|^2 = c |deps|^2``, at levels from p has W = p w c. ``W = 1/2`` is
the evidence lower bound; a W that never rises with the logSNR is the bound of data with added noise
(Kingma and Gao 2023). Published models: ``recipes.edm().weighting`` etc. Factories raise ValueError
for parameters that are not finite, or not positive where they must be.
"""

import abc
import math
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.checks import Real, as_parameter, checked, is_concrete, log_positive
from mdm_jax.gaussian import parameterisations, schedules
from mdm_jax.gaussian.parameterisations import DataStd, Output, check_sigma_data
from mdm_jax.gaussian.paths import Path, vp
from mdm_jax.gaussian.schedules.laws import Mean, Std
from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules.coordinates import as_float
from mdm_jax.schedules.laws import Law
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
    """``W = 1/2``: the evidence lower bound, nats (Kingma et al. 2021, VDM)."""

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


@pytree_dataclass
class Sinking(Weighting):
    """``sum_f share_f s(lambda - level_f) s(level_f - lambda)``, s the sigmoid; [F] each."""

    levels: Array
    log_shares: Array

    def log_weight(self, logsnr: ArrayLike) -> Array:
        logsnr = jnp.asarray(as_float(logsnr))
        each = (1,) * logsnr.ndim + (-1,)
        above = logsnr[..., None] - self.levels.reshape(each)
        bumps = jax.nn.log_sigmoid(above) + jax.nn.log_sigmoid(-above)
        return jax.nn.logsumexp(self.log_shares.reshape(each) + bumps, axis=-1)


Gamma = Annotated[ArrayLike, Real("(0, 1e6]", "SNR", "above which the weight falls")]

elbo = Elbo


def from_law(law: Law) -> Product:
    """``W = p``: eps error with unit weight (DDPM's "simple" loss)."""
    return Product(law, ())


def from_recipe(
    law: Law, output: Output, path: Path | None = None, explicit: Weighting | None = None
) -> Product:
    """Effective weight ``W = p w c``, with w ``explicit`` (default 1) and c that of ``output``.

    ``path``, by default variance-preserving, matters for the outputs v and score only.
    """
    factor = OutputFactor(output, vp() if path is None else path)
    return Product(law, (factor,) if explicit is None else (factor, explicit))


@checked
def sigmoid(
    bias: Annotated[ArrayLike, Real("[-100, 100]", "logSNR", "where the weight is a half")] = 2.0,
) -> Sigmoid:
    """``W = sigmoid(bias - lambda)`` in dlambda, without a law (Hoogeboom et al. 2024, SiD2)."""
    return Sigmoid(as_parameter(bias, "bias"))


@checked
def edm_monotonic(mean: Mean = -1.2, std: Std = 1.2, sigma_data: DataStd = 0.5) -> FlatBelow:
    """EDM's weighting, flat below its peak (Kingma and Gao 2023). TypeError if traced."""
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
    base = from_recipe(schedules.lognormal(mean, std), parameterisations.edm(sigma_data))
    return FlatBelow(base, float((low + high) / 2))


@checked
def min_snr(law: Law, gamma: Gamma = 5.0) -> Product:
    """``p min(1, gamma exp(-lambda))`` (Hang et al. 2023): factor min(SNR, gamma) on x0's error."""
    return Product(law, (MinSnr(log_positive("min_snr", "gamma", gamma)),))


@checked
def soft_min_snr(law: Law, gamma: Gamma = 5.0) -> Product:
    """``p gamma / (gamma + exp(lambda))`` (Crowson et al. 2024), a smooth :func:`min_snr`."""
    return Product(law, (Sigmoid(log_positive("soft_min_snr", "gamma", gamma)),))


@checked
def p2(
    law: Law,
    k: Annotated[ArrayLike, Real("(0, 1e6]", "SNR", "where the weight begins to fall")] = 1.0,
    gamma: Annotated[ArrayLike, Real("[-10, 10]", "", "how fast it falls")] = 1.0,
) -> Product:
    """``p / (k + exp(lambda))^gamma`` (Choi et al. 2022)."""
    return Product(law, (P2(log_positive("p2", "k", k), as_parameter(gamma, "gamma")),))


def truncated_snr(law: Law) -> Product:
    """``p max(1, exp(-lambda))``: factor max(SNR, 1) on x0's error (Salimans and Ho 2022)."""
    return Product(law, (TruncatedSnr(),))


@checked
def spectrum(
    spectrum: tuple[np.ndarray, np.ndarray],
    falloff: Annotated[
        float, Real("[-10, 10]", "", "shares are frequency^-falloff; 1: octaves alike, 0: all")
    ] = 1.0,
) -> Sinking:
    """Levels weigh as much as the frequencies of pictures that sink in noise there (Dieleman 2024).

    ``spectrum``: (frequencies [F], power [F]) of ``gaussian.spectrum.radial_spectrum``. For the
    best estimate of normal data, the share of noise in the power of f that is left is
    ``sigmoid(level_f - lambda)``, level_f = -log power; W is how fast it changes, a mean over f by
    shares, which say what matters to the eye: W is no bound. Integrates to 1. Of power ~ f^-a with
    octaves alike, W is flat between the levels of the ends. ValueError for power that is not
    positive.
    """
    frequencies, power = (np.asarray(each, np.float64) for each in spectrum)
    if not np.all(np.isfinite(power) & (power > 0)):
        raise ValueError(
            f"spectrum needs power above 0 at every frequency, got {power}; frequencies that no "
            "picture has cannot sink"
        )
    shares = frequencies**-falloff
    log_shares = np.log(shares / shares.sum())
    return Sinking(jnp.asarray(-np.log(power)), jnp.asarray(log_shares))


WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    "unit_output": from_recipe,
    "unit_noise": from_law,
    "elbo": elbo,
    "sigmoid": sigmoid,
    "edm_monotonic": edm_monotonic,
    "min_snr": min_snr,
    "soft_min_snr": soft_min_snr,
    "p2": p2,
    "truncated_snr": truncated_snr,
    "spectrum": spectrum,
}
"""Name -> factory; ``law``, ``output``, ``path`` and ``spectrum``, where they are arguments, are
the run's."""
