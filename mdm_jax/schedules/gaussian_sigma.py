"""Gaussian schedules written for sigma: the noise-to-signal ratio ``exp(-logsnr / 2)``.

These are the curves of variance-exploding diffusion (EDM and its relatives); as laws of the logSNR
they serve every path.
"""

import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri

from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules.coordinates import as_float
from mdm_jax.schedules.curve_law import CurveLaw
from mdm_jax.schedules.laws import Tails, TwoSidedLaw, Uniform, uniform
from mdm_jax.schedules.masked_schedule import Instant
from mdm_jax.schedules.parameters import as_parameter, check_finite, is_concrete
from mdm_jax.typing import Array, ArrayLike


@pytree_dataclass
class Normal(TwoSidedLaw):
    """Normal law of the logSNR."""

    loc: ArrayLike
    scale: ArrayLike

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return -jnp.inf, jnp.inf

    def log_pdf(self, logsnr: ArrayLike) -> Array:
        z = (as_float(logsnr) - self.loc) / self.scale
        normaliser = jnp.log(self.scale) + 0.5 * jnp.log(2 * jnp.pi)
        return -0.5 * jnp.square(z) - normaliser.astype(z.dtype)

    def tails(self, logsnr: ArrayLike) -> Tails:
        z = (as_float(logsnr) - self.loc) / self.scale
        return Tails(ndtr(z), ndtr(-z))

    def quantile(self, below: Array, above: Array) -> Array:
        # Each half from its own small probability.
        low = below < 0.5
        z = ndtri(jnp.where(low, below, above))
        return self.loc + self.scale * jnp.where(low, z, -z)


@pytree_dataclass
class PowerSigma(CurveLaw):
    """sigma = (sigma_min^(1/rho) (1 - t) + sigma_max^(1/rho) t)^rho."""

    sigma_min: ArrayLike
    sigma_max: ArrayLike
    rho: ArrayLike

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return -2 * jnp.log(self.sigma_max), -2 * jnp.log(self.sigma_min)

    def logsnr_formula(self, at: Instant) -> Array:
        low, high = self._roots()
        return -2 * self.rho * jnp.log(low * at.rest + high * at.t)

    def time_formula(self, logsnr: Array) -> Instant:
        low, high = self._roots()
        root = jnp.exp(-0.5 * logsnr / self.rho)
        return Instant((root - low) / (high - low), (high - root) / (high - low))

    def log_pdf_formula(self, logsnr: Array) -> Array:
        low, high = self._roots()
        speed = jnp.log(2 * self.rho * (high - low)).astype(logsnr.dtype)
        return -0.5 * logsnr / self.rho - speed

    def _roots(self) -> tuple[Array, Array]:
        return jnp.power(self.sigma_min, 1 / self.rho), jnp.power(self.sigma_max, 1 / self.rho)


def lognormal(mean: ArrayLike, std: ArrayLike) -> Normal:
    """log sigma ~ N(mean, std^2), so logsnr ~ N(-2 mean, 4 std^2). EDM (Karras et al. 2022).

    Raises:
        ValueError: unless std > 0, both finite.
    """
    mean, std = as_parameter(mean, "mean"), as_parameter(std, "std")
    check_finite("lognormal", mean=mean, std=std)
    if is_concrete(std) and not std > 0:
        raise ValueError(f"lognormal needs std > 0, got {std}")
    return Normal(-2 * mean, 2 * std)


def edm_lognormal() -> Normal:
    """:func:`lognormal` with mean -1.2 and standard deviation 1.2, the training noise of EDM."""
    return lognormal(-1.2, 1.2)


def edm2_lognormal() -> Normal:
    """:func:`lognormal` with mean -0.4 and standard deviation 1, that of EDM2's latent models."""
    return lognormal(-0.4, 1.0)


def edm_sigma(sigma_min: ArrayLike = 0.002, sigma_max: ArrayLike = 80.0) -> PowerSigma:
    """sigma uniform on [sigma_min, sigma_max]: EDM's sigma(t) = t under a uniform time.

    ``edm_sigma(0, 1)`` is logsnr = -2 log t.

    Raises:
        ValueError: unless 0 <= sigma_min < sigma_max, both finite.
    """
    low, high = _sigmas("edm_sigma", sigma_min, sigma_max, least=0.0)
    return PowerSigma(low, high, 1.0)


def edm_rho(
    sigma_min: ArrayLike = 0.002, sigma_max: ArrayLike = 80.0, rho: ArrayLike = 7.0
) -> PowerSigma:
    """sigma^(1/rho) uniform: EDM's step spacing (Karras et al. 2022, eq. 5) as a law.

    Its density is proportional to exp(-logsnr / (2 rho)). The grid of N steps that ends at sigma 0
    is ``spacings.edm``.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max and rho > 0, all finite.
    """
    low, high = _sigmas("edm_rho", sigma_min, sigma_max)
    rho = as_parameter(rho, "rho")
    check_finite("edm_rho", rho=rho)
    if is_concrete(rho) and not rho > 0:
        raise ValueError(f"edm_rho needs rho > 0, got {rho}")
    return PowerSigma(low, high, rho)


def ve_geometric(sigma_min: ArrayLike = 0.01, sigma_max: ArrayLike = 50.0) -> Uniform:
    """sigma = sigma_min^(1 - t) sigma_max^t, the VE-SDE of Song et al. (2021): uniform logSNR.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max, both finite.
    """
    low, high = _sigmas("ve_geometric", sigma_min, sigma_max)
    return Uniform(-2 * jnp.log(high), -2 * jnp.log(low))


def uniform_logsnr(low: ArrayLike = -5.0, high: ArrayLike = 13.3) -> Uniform:
    """logsnr = high - (high - low) t. The defaults are VDM's initial gamma, with its sign turned.

    Raises:
        ValueError: unless low < high, both finite.
    """
    return uniform(low, high)


def _sigmas(
    name: str, sigma_min: ArrayLike, sigma_max: ArrayLike, least: float | None = None
) -> tuple[ArrayLike, ArrayLike]:
    low, high = as_parameter(sigma_min, "sigma_min"), as_parameter(sigma_max, "sigma_max")
    check_finite(name, sigma_min=low, sigma_max=high)
    if is_concrete(low, high) and not ((low > 0 or low == least) and low < high):
        sign = "<" if least is None else "<="
        raise ValueError(f"{name} needs 0 {sign} sigma_min < sigma_max, got {low}, {high}")
    return low, high
