"""Paths of Gaussian diffusion: signal and noise amplitude as functions of the logSNR.

``x = alpha x0 + sigma eps`` with ``logsnr = 2 log(alpha / sigma)``; large is clean. Computed by
logarithms: ``sqrt(1 - alpha^2)`` in float32 is off by 0.4 % at logSNR 12, these forms keep a
relative error of 1e-6 from -20 to 20. Methods are elementwise.
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


def by_name(name: str) -> Path:
    """The path of that name; ValueError for an unknown one, with close matches."""
    if name not in PATHS:
        raise unknown_name(name, PATHS, "path")
    return PATHS[name]()
