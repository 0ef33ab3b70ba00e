"""Paths of Gaussian diffusion: signal and noise amplitude as functions of the logSNR.

A noisy example is ``x = alpha x0 + sigma eps`` with ``logsnr = 2 log(alpha / sigma)``: large is
clean. Logarithms are the primitives: ``sqrt(1 - alpha^2)`` in float32 is off by 0.4 % at logSNR 12,
the forms here keep a relative error of 1e-6 from -20 to 20. All functions are elementwise.
"""

import abc
from typing import ClassVar

import jax
import jax.numpy as jnp

from mdm_jax.checks import unknown_name
from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules.coordinates import as_float
from mdm_jax.types import Array, ArrayLike


class Path(abc.ABC):
    """Base of the paths. ``log_sigma`` has a default, overridden where it loses digits."""

    name: ClassVar[str]

    @abc.abstractmethod
    def log_alpha(self, logsnr: ArrayLike) -> Array:
        """log of the signal amplitude."""

    def log_sigma(self, logsnr: ArrayLike) -> Array:
        """log of the noise amplitude (a standard deviation)."""
        return self.log_alpha(logsnr) - 0.5 * as_float(logsnr)

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


@pytree_dataclass
class VarianceExploding(Path):
    """``alpha = 1``, so that sigma is EDM's (Song et al. 2021, Karras et al. 2022)."""

    name: ClassVar[str] = "ve"

    def log_alpha(self, logsnr: ArrayLike) -> Array:
        return jnp.zeros_like(as_float(logsnr))


@pytree_dataclass
class Flow(Path):
    """``alpha + sigma = 1``: straight lines from noise to data (Liu et al. 2023, Lipman et al.)."""

    name: ClassVar[str] = "flow"

    def log_alpha(self, logsnr: ArrayLike) -> Array:
        return jax.nn.log_sigmoid(0.5 * as_float(logsnr))

    def log_sigma(self, logsnr: ArrayLike) -> Array:
        return jax.nn.log_sigmoid(-0.5 * as_float(logsnr))


@pytree_dataclass
class SongSubVP(Path):
    """``alpha^2 + sigma = 1``, the "sub-VP" SDE of Song et al. 2021 (not :class:`Flow`)."""

    name: ClassVar[str] = "song_subvp"

    def log_alpha(self, logsnr: ArrayLike) -> Array:
        # alpha = 2 / (s + sqrt(s^2 + 4)) with s = sigma / alpha.
        return -jnp.arcsinh(0.5 * jnp.exp(-0.5 * as_float(logsnr)))


vp, ve, flow, song_subvp = VariancePreserving, VarianceExploding, Flow, SongSubVP

PATHS: dict[str, type[Path]] = {path.name: path for path in (vp, ve, flow, song_subvp)}
"""Name -> path, for configurations."""


def by_name(name: str) -> Path:
    """The path of that name; ValueError for an unknown one, with close matches."""
    if name not in PATHS:
        raise unknown_name(name, PATHS, "path")
    return PATHS[name]()


# Noise coordinates of other code bases. DPM-Solver's lambda is logsnr / 2, VDM's gamma is -logsnr.


def sigma_from_logsnr(logsnr: ArrayLike) -> Array:
    """The sigma of EDM and EDM2: noise over signal amplitude, ``exp(-logsnr / 2)``."""
    return jnp.exp(-0.5 * as_float(logsnr))


def logsnr_from_sigma(sigma: ArrayLike) -> Array:
    """``-2 log sigma``; +inf at 0."""
    return -2.0 * jnp.log(as_float(sigma))


def flow_time(logsnr: ArrayLike) -> Array:
    """Time of rectified flow, 0 = clean: the noise amplitude of the flow path."""
    return jax.nn.sigmoid(-0.5 * as_float(logsnr))


def logsnr_from_flow_time(time: ArrayLike, rest: ArrayLike | None = None) -> Array:
    """``2 log((1 - t) / t)`` for t in [0, 1].

    ``rest`` is 1 - time, where the caller knows it more exactly than the difference.
    """
    time = as_float(time)
    log_rest = jnp.log1p(-time) if rest is None else jnp.log(as_float(rest))
    return 2.0 * (log_rest - jnp.log(time))


def cosine_time(logsnr: ArrayLike) -> Array:
    """Time of the cosine schedule ``alpha = cos(pi t / 2)``, 0 = clean."""
    return (2.0 / jnp.pi) * jnp.arctan(jnp.exp(-0.5 * as_float(logsnr)))


def logsnr_from_cosine_time(time: ArrayLike, rest: ArrayLike | None = None) -> Array:
    """``-2 log tan(pi t / 2)`` for t in [0, 1]; ``rest`` as in :func:`logsnr_from_flow_time`."""
    time = as_float(time)
    rest = 1.0 - time if rest is None else as_float(rest)
    noisy = 2.0 * jnp.log(jnp.tan(0.5 * jnp.pi * jnp.minimum(rest, 0.5)))
    clean = -2.0 * jnp.log(jnp.tan(0.5 * jnp.pi * jnp.minimum(time, 0.5)))
    return jnp.where(time < 0.5, clean, noisy)
