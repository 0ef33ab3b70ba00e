"""Paths of Gaussian diffusion: how a logSNR is split into signal and noise amplitude.

A noisy example is ``x = alpha x0 + sigma eps`` with eps standard normal and

    lambda = 2 log(alpha / sigma) ,

so a path is one function of the logSNR, and everything about it follows. A loss depends on the path
only through the scale of the network's inputs and, for some outputs, through the scale of the
target (:mod:`~mdm_jax.schedules.parameterisations`): ``x / alpha = x0 + exp(-lambda / 2) eps`` is
the same for all paths.

Logarithms are the primitives. ``sqrt(1 - alpha^2)`` in float32 is off by 0.4 % at lambda = 12 and
by all of it at 18; the forms here keep a relative error of 1e-6 from -20 to 20.

The noise coordinates of other code bases, from the logSNR and back.

Four quantities are called lambda or log-SNR in public code; here ``logsnr`` always means
``log(alpha^2 / sigma^2)``, large = clean. All functions are elementwise, logarithms natural.
"""

import abc
import difflib
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules.coordinates import as_float
from mdm_jax.types import Array, ArrayLike


class Path(abc.ABC):
    """Base of the paths; methods are elementwise in the logSNR and jit-able.

    A subclass gives ``log_alpha`` and ``log_alpha_slope``; since their differences are lambda / 2
    and 1 / 2 for every path, the noise amplitude has defaults, overridden where they lose digits.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def log_alpha(self, logsnr: ArrayLike) -> Array:
        """log of the signal amplitude, natural."""

    @abc.abstractmethod
    def log_alpha_slope(self, logsnr: ArrayLike) -> Array:
        """Derivative of ``log_alpha`` with respect to the logSNR."""

    def log_sigma(self, logsnr: ArrayLike) -> Array:
        """log of the noise amplitude (a standard deviation), natural."""
        return self.log_alpha(logsnr) - 0.5 * as_float(logsnr)

    def log_sigma_slope(self, logsnr: ArrayLike) -> Array:
        """Derivative of ``log_sigma`` with respect to the logSNR."""
        return self.log_alpha_slope(logsnr) - 0.5

    def alpha(self, logsnr: ArrayLike) -> Array:
        """Signal amplitude."""
        return jnp.exp(self.log_alpha(logsnr))

    def sigma(self, logsnr: ArrayLike) -> Array:
        """Noise amplitude (a standard deviation)."""
        return jnp.exp(self.log_sigma(logsnr))


@pytree_dataclass
class VariancePreserving(Path):
    """``alpha^2 + sigma^2 = 1``: unit-variance data keeps unit variance (Song et al. 2021)."""

    name: ClassVar[str] = "vp"

    def log_alpha(self, logsnr: ArrayLike) -> Array:
        return 0.5 * jax.nn.log_sigmoid(as_float(logsnr))

    def log_sigma(self, logsnr: ArrayLike) -> Array:
        return 0.5 * jax.nn.log_sigmoid(-as_float(logsnr))

    def log_alpha_slope(self, logsnr: ArrayLike) -> Array:
        return 0.5 * jax.nn.sigmoid(-as_float(logsnr))

    def log_sigma_slope(self, logsnr: ArrayLike) -> Array:
        return -0.5 * jax.nn.sigmoid(as_float(logsnr))


@pytree_dataclass
class VarianceExploding(Path):
    """``alpha = 1``: noise is added to data of fixed scale (Song et al. 2021, Karras et al. 2022).

    Its sigma is EDM's.
    """

    name: ClassVar[str] = "ve"

    def log_alpha(self, logsnr: ArrayLike) -> Array:
        return jnp.zeros_like(as_float(logsnr))

    def log_alpha_slope(self, logsnr: ArrayLike) -> Array:
        return jnp.zeros_like(as_float(logsnr))


@pytree_dataclass
class Flow(Path):
    """``alpha + sigma = 1``: straight lines from noise to data (Liu et al. 2023, Lipman et al.)."""

    name: ClassVar[str] = "flow"

    def log_alpha(self, logsnr: ArrayLike) -> Array:
        return jax.nn.log_sigmoid(0.5 * as_float(logsnr))

    def log_sigma(self, logsnr: ArrayLike) -> Array:
        return jax.nn.log_sigmoid(-0.5 * as_float(logsnr))

    def log_alpha_slope(self, logsnr: ArrayLike) -> Array:
        return 0.5 * jax.nn.sigmoid(-0.5 * as_float(logsnr))

    def log_sigma_slope(self, logsnr: ArrayLike) -> Array:
        return -0.5 * jax.nn.sigmoid(0.5 * as_float(logsnr))


@pytree_dataclass
class SongSubVP(Path):
    """``alpha^2 + sigma = 1``, the "sub-VP" SDE of Song et al. 2021.

    Not to be taken for :class:`Flow`, which has been given the same name elsewhere.
    """

    name: ClassVar[str] = "song_subvp"

    def log_alpha(self, logsnr: ArrayLike) -> Array:
        # alpha = 2 / (s + sqrt(s^2 + 4)) with s = sigma / alpha.
        return -jnp.arcsinh(0.5 * jnp.exp(-0.5 * as_float(logsnr)))

    def log_alpha_slope(self, logsnr: ArrayLike) -> Array:
        return 0.5 * jnp.exp(-0.5 * jax.nn.softplus(as_float(logsnr) + math.log(4.0)))

    def log_sigma_slope(self, logsnr: ArrayLike) -> Array:
        return 0.5 * jnp.expm1(-0.5 * jax.nn.softplus(as_float(logsnr) + math.log(4.0)))


def vp() -> VariancePreserving:
    """The variance-preserving path, ``alpha^2 = sigmoid(lambda)``."""
    return VariancePreserving()


def ve() -> VarianceExploding:
    """The variance-exploding path, ``alpha = 1``."""
    return VarianceExploding()


def flow() -> Flow:
    """The path of flow matching, ``alpha = sigmoid(lambda / 2)``."""
    return Flow()


def song_subvp() -> SongSubVP:
    """Song et al.'s sub-VP path, ``sigma = 1 - alpha^2``."""
    return SongSubVP()


PATHS: dict[str, Callable[[], Path]] = {
    "vp": vp,
    "ve": ve,
    "flow": flow,
    "song_subvp": song_subvp,
}
"""Name -> factory, for configurations."""


def by_name(name: str) -> Path:
    """The path of that name.

    Raises:
        ValueError: for an unknown name, with the nearest known ones.
    """
    if name not in PATHS:
        near = difflib.get_close_matches(name, PATHS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown path {name!r}; {hint}known: {', '.join(sorted(PATHS))}")
    return PATHS[name]()


def sigma_from_logsnr(logsnr: ArrayLike) -> Array:
    """The sigma of EDM and EDM2: noise over signal amplitude, ``exp(-lambda / 2)``."""
    return jnp.exp(-0.5 * as_float(logsnr))


def logsnr_from_sigma(sigma: ArrayLike) -> Array:
    """``-2 log sigma``; +inf at 0."""
    return -2.0 * jnp.log(as_float(sigma))


def half_logsnr(logsnr: ArrayLike) -> Array:
    """The lambda of DPM-Solver, ``log(alpha / sigma)``; also the ``t`` of k-diffusion's DPM-++."""
    return 0.5 * as_float(logsnr)


def logsnr_from_half(half: ArrayLike) -> Array:
    """Inverse of :func:`half_logsnr`."""
    return 2.0 * as_float(half)


def vdm_gamma(logsnr: ArrayLike) -> Array:
    """The gamma of VDM, ``-lambda``."""
    return -as_float(logsnr)


def logsnr_from_vdm_gamma(gamma: ArrayLike) -> Array:
    """Inverse of :func:`vdm_gamma`."""
    return -as_float(gamma)


def flow_time(logsnr: ArrayLike) -> Array:
    """Noise amplitude of the flow path, the time of rectified flow with 0 = clean."""
    return jax.nn.sigmoid(-0.5 * as_float(logsnr))


def logsnr_from_flow_time(time: ArrayLike, rest: ArrayLike | None = None) -> Array:
    """``2 log((1 - t) / t)``.

    Args:
        time: in [0, 1], 0 is clean.
        rest: 1 - time, where the caller knows it more exactly than the difference.
    """
    time = as_float(time)
    log_rest = jnp.log1p(-time) if rest is None else jnp.log(as_float(rest))
    return 2.0 * (log_rest - jnp.log(time))


def cosine_time(logsnr: ArrayLike) -> Array:
    """Time of the cosine schedule ``alpha = cos(pi t / 2)``, 0 = clean."""
    return (2.0 / jnp.pi) * jnp.arctan(jnp.exp(-0.5 * as_float(logsnr)))


def logsnr_from_cosine_time(time: ArrayLike, rest: ArrayLike | None = None) -> Array:
    """``-2 log tan(pi t / 2)``.

    Args:
        time: in [0, 1], 0 is clean.
        rest: 1 - time, where the caller knows it more exactly than the difference; without it the
            result is as inexact near 1 as the argument.
    """
    time = as_float(time)
    rest = 1.0 - time if rest is None else as_float(rest)
    noisy = 2.0 * jnp.log(jnp.tan(0.5 * jnp.pi * jnp.minimum(rest, 0.5)))
    clean = -2.0 * jnp.log(jnp.tan(0.5 * jnp.pi * jnp.minimum(time, 0.5)))
    return jnp.where(time < 0.5, clean, noisy)
