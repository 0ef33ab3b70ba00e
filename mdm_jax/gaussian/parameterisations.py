"""Outputs of a Gaussian denoiser, and conversions between them.

All are ``y = A x0 + B eps`` with A, B functions of path and logSNR. With D = A sigma - B alpha,
``y' = (D' / D) y + ((A B' - A' B) / D) x`` and ``|dy|^2 = (D / sigma)^2 |dx0|^2 = (D / alpha)^2
|deps|^2``. Compute losses in the network's own output, times a factor of the level: converting eps
to x0 multiplies rounding errors by exp(-logsnr / 2), and back by exp(logsnr / 2).
"""

import abc
import math
from collections.abc import Callable
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp

from mdm_jax.checks import Real, as_parameter, check_finite, is_concrete, unknown_name
from mdm_jax.gaussian.paths import Path
from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules.coordinates import as_float
from mdm_jax.types import Array, ArrayLike

DataStd = Annotated[ArrayLike, Real("(0, 1e4]", "", "standard deviation of the data")]


class Output(abc.ABC):
    """Base of the outputs. Methods are elementwise in the logSNR, on any path."""

    name: ClassVar[str]
    sign: ClassVar[int]
    """Sign of the determinant D, the same at all levels."""

    @abc.abstractmethod
    def coefficients(self, path: Path, logsnr: ArrayLike) -> tuple[Array, Array]:
        """(A, B), the factors of the clean data and of the noise."""

    @abc.abstractmethod
    def log_determinant(self, path: Path, logsnr: ArrayLike) -> Array:
        """``log |A sigma - B alpha|``, without the difference."""

    def target(self, path: Path, logsnr: ArrayLike, x0: Array, eps: Array) -> Array:
        """The training target. The logSNR must broadcast against the data."""
        data, noise = self.coefficients(path, logsnr)
        return data * x0 + noise * eps

    def to_x0(self, path: Path, logsnr: ArrayLike, y: Array, x: Array) -> Array:
        """The clean data implied by the output ``y`` at the noisy input ``x``."""
        return convert(y, x, path, logsnr, self, CleanData())

    def log_eps_weight(self, path: Path, logsnr: ArrayLike) -> Array:
        """``log c`` with ``|dy|^2 = c |deps|^2``; for ``c |dx0|^2`` add the logSNR."""
        return 2.0 * (self.log_determinant(path, logsnr) - path.log_alpha(logsnr))


def convert(
    y: Array, x: Array, path: Path, logsnr: ArrayLike, source: Output, target: Output
) -> Array:
    """Convert an output at noisy input ``x``; well-conditioned between v, flow velocity and F."""
    determinant = source.log_determinant(path, logsnr)
    change = target.log_determinant(path, logsnr) - determinant
    data, noise = source.coefficients(path, logsnr)
    target_data, target_noise = target.coefficients(path, logsnr)
    cross = data * target_noise - target_data * noise
    from_y = (source.sign * target.sign) * jnp.exp(change)
    return from_y * y + (source.sign * cross * jnp.exp(-determinant)) * x


@pytree_dataclass
class CleanData(Output):
    """``y = x0``; the network is the denoiser E[x0 | x]."""

    name: ClassVar[str] = "x0"
    sign: ClassVar[int] = 1

    def coefficients(self, path: Path, logsnr: ArrayLike) -> tuple[Array, Array]:
        del path
        one = jnp.ones_like(as_float(logsnr))
        return one, jnp.zeros_like(one)

    def log_determinant(self, path: Path, logsnr: ArrayLike) -> Array:
        return path.log_sigma(logsnr)


@pytree_dataclass
class Noise(Output):
    """``y = eps`` (Ho et al. 2020)."""

    name: ClassVar[str] = "eps"
    sign: ClassVar[int] = -1

    def coefficients(self, path: Path, logsnr: ArrayLike) -> tuple[Array, Array]:
        del path
        one = jnp.ones_like(as_float(logsnr))
        return jnp.zeros_like(one), one

    def log_determinant(self, path: Path, logsnr: ArrayLike) -> Array:
        return path.log_alpha(logsnr)


@pytree_dataclass
class Velocity(Output):
    """``y = alpha eps - sigma x0`` (Salimans and Ho 2022), on any path."""

    name: ClassVar[str] = "v"
    sign: ClassVar[int] = -1

    def coefficients(self, path: Path, logsnr: ArrayLike) -> tuple[Array, Array]:
        return -path.sigma(logsnr), path.alpha(logsnr)

    def log_determinant(self, path: Path, logsnr: ArrayLike) -> Array:
        return jnp.logaddexp(2.0 * path.log_alpha(logsnr), 2.0 * path.log_sigma(logsnr))


@pytree_dataclass
class FlowVelocity(Output):
    """``y = eps - x0``, the velocity of the flow path, on any path."""

    name: ClassVar[str] = "flow"
    sign: ClassVar[int] = -1

    def coefficients(self, path: Path, logsnr: ArrayLike) -> tuple[Array, Array]:
        del path
        one = jnp.ones_like(as_float(logsnr))
        return -one, one

    def log_determinant(self, path: Path, logsnr: ArrayLike) -> Array:
        return jnp.logaddexp(path.log_alpha(logsnr), path.log_sigma(logsnr))


@pytree_dataclass
class Score(Output):
    """``y = -eps / sigma``, the gradient of the log density of the noisy data."""

    name: ClassVar[str] = "score"
    sign: ClassVar[int] = 1

    def coefficients(self, path: Path, logsnr: ArrayLike) -> tuple[Array, Array]:
        log_sigma = path.log_sigma(logsnr)
        return jnp.zeros_like(log_sigma), -jnp.exp(-log_sigma)

    def log_determinant(self, path: Path, logsnr: ArrayLike) -> Array:
        return path.log_alpha(logsnr) - path.log_sigma(logsnr)


@pytree_dataclass
class EdmOutput(Output):
    """``F`` with ``D(x) = c_skip x / alpha + c_out F`` (Karras et al. 2022, equation 7).

    Its variance is 1 at all levels for data of std ``sigma_data``; at 1 it is -v of path ``vp``.
    """

    sigma_data: ArrayLike

    name: ClassVar[str] = "edm"
    sign: ClassVar[int] = 1

    def coefficients(self, path: Path, logsnr: ArrayLike) -> tuple[Array, Array]:
        del path
        shifted = standardised_logsnr(logsnr, self.sigma_data)
        data = jnp.exp(0.5 * jax.nn.log_sigmoid(-shifted)) / self.sigma_data
        return data, -jnp.exp(0.5 * jax.nn.log_sigmoid(shifted))

    def log_determinant(self, path: Path, logsnr: ArrayLike) -> Array:
        shifted = standardised_logsnr(logsnr, self.sigma_data)
        return path.log_alpha(logsnr) - 0.5 * jax.nn.log_sigmoid(shifted)


x0, eps, v, flow, score = CleanData, Noise, Velocity, FlowVelocity, Score


def edm(sigma_data: ArrayLike = 0.5) -> EdmOutput:
    """EDM's F for data of that standard deviation; ValueError unless positive and finite."""
    return EdmOutput(check_sigma_data("edm", sigma_data))


OUTPUTS: dict[str, Callable[..., Output]] = {
    "x0": x0,
    "eps": eps,
    "v": v,
    "flow": flow,
    "score": score,
    "edm": edm,
}


def by_name(name: str, **parameters: ArrayLike) -> Output:
    """The output of that name; ValueError for an unknown one, with close matches."""
    if name not in OUTPUTS:
        raise unknown_name(name, OUTPUTS, "output")
    return OUTPUTS[name](**parameters)


def check_sigma_data(name: str, sigma_data: ArrayLike) -> ArrayLike:
    """The standard deviation as a parameter; ValueError unless it is positive and finite."""
    sigma_data = as_parameter(sigma_data, "sigma_data")
    check_finite(name, sigma_data=sigma_data)
    if is_concrete(sigma_data) and not sigma_data > 0:
        raise ValueError(f"{name} needs sigma_data > 0, got {sigma_data}")
    return sigma_data


def standardised_logsnr(logsnr: ArrayLike, sigma_data: ArrayLike) -> Array:
    """The logSNR of data divided by its standard deviation."""
    log_std = math.log(sigma_data) if is_concrete(sigma_data) else jnp.log(sigma_data)
    return as_float(logsnr) + 2.0 * log_std
