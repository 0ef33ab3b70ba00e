"""Discrete noise tables, and the continuous laws that interpolate them.

A table is NumPy float64 [num_steps], the falling logSNR after k = 1, 2, ... noising steps, at
times k / num_steps; time 0, clean data, is in no table.
"""

import operator
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.checks import Real, Whole, checked, is_concrete
from mdm_jax.gaussian.schedules.laws import amplitude_loss, log_amplitude_rate
from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules.coordinates import MaskingLevel, logsnr_from_log_survival_probability
from mdm_jax.schedules.laws import CurveLaw, Instant
from mdm_jax.types import Array, ArrayLike


@pytree_dataclass
class InterpolatedDecay(CurveLaw):
    """-log alpha^2 linear in time between ``decay`` [num_steps + 1], rising from 0."""

    decay: Array

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return logsnr_from_log_survival_probability(-self.decay[-1]), jnp.inf

    def logsnr_formula(self, at: Instant) -> Array:
        return logsnr_from_log_survival_probability(-_interpolate(self.decay, at))

    def time_formula(self, level: MaskingLevel) -> Instant:
        return _locate(self.decay, -level.log_survival)[0]

    def log_pdf_formula(self, level: MaskingLevel) -> Array:
        return level.log_rate - jnp.log(_locate(self.decay, -level.log_survival)[1])


@pytree_dataclass
class InterpolatedAmplitude(CurveLaw):
    """alpha linear in time; ``loss`` [num_steps + 1] is 1 - alpha, rising from 0."""

    loss: Array

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return self._logsnr(self.loss[-1]), jnp.inf

    def logsnr_formula(self, at: Instant) -> Array:
        return self._logsnr(_interpolate(self.loss, at))

    def time_formula(self, level: MaskingLevel) -> Instant:
        return _locate(self.loss, amplitude_loss(level))[0]

    def log_pdf_formula(self, level: MaskingLevel) -> Array:
        return log_amplitude_rate(level) - jnp.log(_locate(self.loss, amplitude_loss(level))[1])

    def _logsnr(self, loss: Array) -> Array:
        return 2 * jnp.log1p(-loss) - jnp.log(loss) - jnp.log(2 - loss)


TableSteps = Annotated[int, Whole("[2, 1e6]", "steps", "of the table")]
TableBeta = Annotated[float, Real("(0, 1)", "variance", "added in a step")]
Offset = Annotated[float, Real("[0, 10]", "time", "before 0")]


@checked
def ddpm_table(
    num_steps: TableSteps = 1000, beta_start: TableBeta = 1e-4, beta_end: TableBeta = 0.02
) -> np.ndarray:
    """logSNR [num_steps >= 2] of DDPM's linear betas in (0, 1), else ValueError. Ho et al. 2020."""
    return table_from_betas(np.linspace(beta_start, beta_end, _count(num_steps)))


@checked
def iddpm_cosine_table(
    num_steps: TableSteps = 1000, offset: Offset = 0.008, max_beta: TableBeta = 0.999
) -> np.ndarray:
    """logSNR [num_steps] of the cosine schedule of Nichol & Dhariwal (2021) with clipped betas.

    ValueError unless num_steps >= 2, offset >= 0 and 0 < max_beta < 1.
    """
    if not offset >= 0:
        raise ValueError(f"iddpm_cosine_table needs offset >= 0, got {offset}")
    rest = np.arange(_count(num_steps), -1, -1) / num_steps
    power = np.square(np.sin(np.pi / 2 * rest / (1 + offset)))
    return table_from_betas(np.minimum(1 - power[1:] / power[:-1], max_beta))


def table_from_betas(betas: ArrayLike) -> np.ndarray:
    """logSNR [num_steps] of the variances ``betas`` added per step of a variance-preserving chain.

    ValueError unless ``betas`` is [num_steps], num_steps >= 2, each strictly in (0, 1).
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or betas.size < 2:
        raise ValueError(f"betas are [num_steps], at least 2, got shape {betas.shape}")
    if not np.all((betas > 0) & (betas < 1)):
        at = int(np.argmin((betas > 0) & (betas < 1)))
        raise ValueError(f"betas lie strictly between 0 and 1, but number {at + 1} is {betas[at]}")
    log_survival = np.cumsum(np.log1p(-betas))
    return log_survival - np.log(-np.expm1(log_survival))


def zero_terminal_table(table: ArrayLike) -> np.ndarray:
    """The table with alpha shifted and scaled so that its last level is pure noise, -inf.

    Lin et al. (2024). Train on v or on the data, as the noise is uninformative at -inf, and start
    the sampler there (``spacings.from_table``, "trailing"). ValueError for a bad table.
    """
    table = check_table(table)
    first, last = _amplitude(table[0]), _amplitude(table[-1])
    amplitude = (_amplitude(table) - last) * first / (first - last)
    noise = _amplitude_loss(table[0]) + (first - _amplitude(table)) * first / (first - last)
    with np.errstate(divide="ignore"):
        logsnr = 2 * np.log(amplitude) - np.log(noise) - np.log1p(amplitude)
    logsnr[0] = table[0]
    return logsnr


def interpolated_table(table: ArrayLike) -> InterpolatedDecay:
    """Law of a continuous time along a table: log alpha^2 linear in between, and from 0 at t = 0.

    DPM-Solver's rule (Lu et al. 2022) for models trained on discrete steps. ValueError for a bad
    table; for zero terminal SNR apply ``zero_terminal`` to the law instead.
    """
    decay = np.logaddexp(0.0, -check_table(table))
    return InterpolatedDecay(np.append(0.0, decay))


@checked
def ddpm_discrete(
    num_steps: TableSteps = 1000, beta_start: TableBeta = 1e-4, beta_end: TableBeta = 0.02
) -> InterpolatedDecay:
    """Law interpolating :func:`ddpm_table`; differs from ``ddpm_linear`` by up to 0.07."""
    return interpolated_table(ddpm_table(num_steps, beta_start, beta_end))


@checked
def iddpm_discrete(
    num_steps: TableSteps = 1000, offset: Offset = 0.008, max_beta: TableBeta = 0.999
) -> InterpolatedDecay:
    """Law interpolating :func:`iddpm_cosine_table`."""
    return interpolated_table(iddpm_cosine_table(num_steps, offset, max_beta))


@checked
def wavegrad(
    num_steps: TableSteps = 1000, beta_start: TableBeta = 1e-6, beta_end: TableBeta = 0.01
) -> InterpolatedAmplitude:
    """WaveGrad (2021): alpha uniform within a uniformly chosen segment of a table of alpha.

    The table is :func:`ddpm_table` preceded by alpha = 1. Defaults are recalled from the paper.
    """
    loss = _amplitude_loss(ddpm_table(num_steps, beta_start, beta_end))
    return InterpolatedAmplitude(np.append(0.0, loss))


def check_table(table: ArrayLike) -> np.ndarray:
    """Check a table: float64 [n >= 2], finite, falling, else ValueError; TypeError if traced."""
    if not is_concrete(table):
        raise TypeError("a noise table is built and checked outside of jit")
    table = np.asarray(table, np.float64)
    if table.ndim != 1 or table.size < 2:
        raise ValueError(f"a noise table is logSNR [num_steps], at least 2, got {table.shape}")
    if not (np.all(np.isfinite(table)) and np.all(np.diff(table) < 0)):
        raise ValueError(
            "a noise table holds finite logSNR that fall strictly (clean to noisy); "
            f"got {table[:3]} ... {table[-3:]}"
        )
    return table


def _interpolate(table: Array, at: Instant) -> Array:
    """Linear interpolation between equally spaced times, from the nearer end."""
    table = jnp.asarray(table)
    cells = table.size - 1
    early = at.t < 0.5
    from_start, from_end = at.t * cells, at.rest * cells
    left = jnp.where(early, jnp.floor(from_start), cells - 1 - jnp.floor(from_end))
    cell = jnp.clip(jax.lax.stop_gradient(left), 0, cells - 1).astype(int)
    rise = jnp.diff(table)[cell]
    upward = table[cell] + rise * (from_start - cell.astype(table.dtype))
    downward = table[cell + 1] - rise * (from_end - (cells - 1 - cell).astype(table.dtype))
    return jnp.where(early, upward, downward)


def _locate(table: Array, value: Array) -> tuple[Instant, Array]:
    """Time at which the interpolated table has a value, and its derivative there."""
    table = jnp.asarray(table)
    cells = table.size - 1
    left = jnp.searchsorted(table, jax.lax.stop_gradient(value), side="right") - 1
    cell = jnp.clip(left, 0, cells - 1)
    rise = jnp.diff(table)[cell]
    before = cell.astype(table.dtype) + (value - table[cell]) / rise
    after = (cells - 1 - cell).astype(table.dtype) + (table[cell + 1] - value) / rise
    return Instant(before / cells, after / cells), rise * cells


def _amplitude_loss(logsnr: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, logsnr)) / (1 + _amplitude(logsnr))


def _amplitude(logsnr: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * np.logaddexp(0.0, -logsnr))


def _count(num_steps: int) -> int:
    if operator.index(num_steps) < 2:
        raise ValueError(f"a noise table needs num_steps >= 2, got {num_steps}")
    return num_steps
