"""Laws moved along the logSNR: the adjustment of a schedule to the size of the data.

More pixels of a smooth image hide more noise, so the same picture quality needs a lower logSNR.
Simple diffusion (Hoogeboom et al. 2023) shifts by ``2 log(reference / size)``, SD3's timestep
shift and a rescaled input are the same operation.
"""

import jax.numpy as jnp
import numpy as np

from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules.coordinates import as_float
from mdm_jax.schedules.curve_law import CurveLaw, solve_time
from mdm_jax.schedules.gaussian_cosine import Cosine
from mdm_jax.schedules.laws import Tails, TwoSidedLaw
from mdm_jax.schedules.masked_schedule import Instant
from mdm_jax.schedules.parameters import as_parameter, check_finite, is_concrete
from mdm_jax.typing import Array, ArrayLike


@pytree_dataclass
class Shifted(TwoSidedLaw):
    """``base`` with ``shift`` added to every level."""

    base: TwoSidedLaw
    shift: ArrayLike

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        low, high = self.base.support
        return low + self.shift, high + self.shift

    def log_pdf(self, logsnr: ArrayLike) -> Array:
        return self.base.log_pdf(as_float(logsnr) - self.shift)

    def tails(self, logsnr: ArrayLike) -> Tails:
        return self.base.tails(as_float(logsnr) - self.shift)

    def quantile(self, below: Array, above: Array) -> Array:
        return self.base.quantile(below, above) + self.shift


@pytree_dataclass
class Interpolated(CurveLaw):
    """``base`` with a shift that runs linearly in time between two values."""

    base: TwoSidedLaw
    clean_shift: ArrayLike
    noisy_shift: ArrayLike

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        low, high = self.base.support
        return low + self.noisy_shift, high + self.clean_shift

    def logsnr_formula(self, at: Instant) -> Array:
        shift = self.clean_shift * at.rest + self.noisy_shift * at.t
        return self.base.quantile(at.rest, at.t) + shift

    def time_formula(self, logsnr: Array) -> Instant:
        return solve_time(self.logsnr_formula, logsnr)

    def log_pdf_formula(self, logsnr: Array) -> Array:
        at = self.time_formula(logsnr)
        log_density = self.base.log_pdf(self.base.quantile(at.rest, at.t))
        slope = (self.clean_shift - self.noisy_shift) * jnp.exp(log_density)
        return log_density - jnp.log1p(slope)


def shifted(base: TwoSidedLaw, shift: ArrayLike) -> Shifted:
    """``base`` with every level moved by ``shift``; negative towards noise.

    Raises:
        TypeError: if ``base`` is not a law with tail probabilities.
        ValueError: if the shift is not finite.
    """
    check_law("shifted", base)
    shift = as_parameter(shift, "shift")
    check_finite("shifted", shift=shift)
    return Shifted(base, shift)


def interpolated(base: TwoSidedLaw, clean_shift: ArrayLike, noisy_shift: ArrayLike) -> Interpolated:
    """``base`` shifted by ``clean_shift`` at t = 0, by ``noisy_shift`` at t = 1, linear in between.

    Raises:
        TypeError: if ``base`` is not a law with tail probabilities.
        ValueError: unless noisy_shift <= clean_shift, both finite, which keeps the curve falling.
    """
    check_law("interpolated", base)
    clean = as_parameter(clean_shift, "clean_shift")
    noisy = as_parameter(noisy_shift, "noisy_shift")
    check_finite("interpolated", clean_shift=clean, noisy_shift=noisy)
    if is_concrete(clean, noisy) and not noisy <= clean:
        raise ValueError(
            f"interpolated needs noisy_shift <= clean_shift, got {noisy} and {clean}; "
            "otherwise the logSNR may rise along time"
        )
    return Interpolated(base, clean, noisy)


def resolution_shift(size: float, reference: float) -> float:
    """2 log(reference / size), the shift for images of side ``size``; doubling costs log 4.

    Raises:
        ValueError: unless both are positive.
    """
    if not (size > 0 and reference > 0):
        raise ValueError(f"resolution_shift needs positive sides, got {size} and {reference}")
    return float(2 * np.log(reference / size))


def cosine_shifted(size: float, reference: float = 64) -> Shifted:
    """The cosine schedule shifted for images of side ``size``. Simple diffusion."""
    return shifted(Cosine(), resolution_shift(size, reference))


def cosine_interpolated(
    size: float, noisy_reference: float = 32, clean_reference: float = 256
) -> Interpolated:
    """The cosine schedule with a shift that runs from one reference size to another.

    Simple diffusion's "interpolated" schedule. The paper truncates the *base* to [-15, 15]:
    ``interpolated(truncated(cosine(), -15, 15), ...)`` with :func:`resolution_shift`.

    Raises:
        ValueError: unless all are positive and noisy_reference <= clean_reference.
    """
    clean = resolution_shift(size, clean_reference)
    return interpolated(Cosine(), clean, resolution_shift(size, noisy_reference))


def check_law(name: str, base: TwoSidedLaw) -> None:
    """Raises TypeError unless ``base`` gives tail probabilities."""
    if not isinstance(base, TwoSidedLaw):
        raise TypeError(
            f"{name} needs a law with tails and quantile, got {type(base).__name__}; "
            "derive the class from schedules.TwoSidedLaw"
        )
