"""Likelihood of Gaussian diffusion: the variational bound, and the probability flow's density.

    NELBO(x0) = E[-log p(x0 | z_high)]                       reconstruction
              + 1/2 int_low^high E|eps - eps_hat|^2 dlambda  diffusion
              + KL(q(x_low | x0) || N(0, 1))                 prior, variance-preserving

in nats between logSNR ``low`` and ``high``, on any path (Kingma et al. 2021, VDM, eq. 11 to 17).
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.checks import check_finite, check_interval, is_concrete
from mdm_jax.estimates import finite_or_none, standard_error_of_mean, standard_error_of_ratio
from mdm_jax.gaussian import paths
from mdm_jax.gaussian.objective import check_float, scaled_integers
from mdm_jax.gaussian.parameterisations import Output
from mdm_jax.gaussian.paths import Path
from mdm_jax.gaussian.samplers.sampler import bind_denoiser
from mdm_jax.gaussian.samplers.step_search import check_levels
from mdm_jax.likelihood.estimators import ScoredRows, check_at_least_one, score_batches
from mdm_jax.likelihood.estimators import row_keys as replicate_keys
from mdm_jax.rng import stream
from mdm_jax.samplers.sampler import row_keys, row_streams
from mdm_jax.schedules.coordinates import log_masking_rate, survival_probability
from mdm_jax.types import Array, ArrayLike, Batch, ModelFn, PyTree

Decoder = Callable[[Array, Array, ArrayLike], Array]
"""``decoder(x0 [..., L], z [..., L], logsnr) -> log p(x0 | z) [..., L]``, nats per element, with
``z = x0 + exp(-logsnr / 2) eps``. Any normalised law makes a valid bound."""

PARTS = ("reconstruction", "diffusion", "prior")

_LN2 = math.log(2.0)
_VP = paths.vp()


def grey_value_decoder(num_values: int) -> Decoder:
    """p(x0 | z) over K equally spaced values from -1 to 1, weighted by N(z; value, exp(-logsnr)).

    The exact posterior of independent, uniform values; on pictures tight where exp(-logsnr / 2) is
    small against the spacing 2 / (K - 1). ``scaled_integers(K)`` makes x0. ValueError unless
    num_values >= 2. Kingma et al. 2021 (VDM), equation 13 and appendix.
    """
    to_values = scaled_integers(num_values)

    def decoder(x0: Array, z: Array, logsnr: ArrayLike) -> Array:
        values = to_values(jnp.arange(num_values)).astype(z.dtype)
        precision = jnp.exp(jnp.asarray(logsnr, z.dtype))

        def add(total: Array, value: Array) -> tuple[Array, None]:
            # log N(z; value) - log N(z; x0), as a product: no difference of large squares.
            log_odds = 0.5 * precision * (value - x0) * (2 * z - value - x0)
            return jnp.logaddexp(total, log_odds), None

        # One value at a time: K numbers per element would not fit for pictures.
        total, _ = jax.lax.scan(add, jnp.full_like(z, -jnp.inf), values)
        return -total

    return decoder


def normal_decoder() -> Decoder:
    """N(x0; z, exp(-logsnr)), for continuous data smooth at the scale of the noise."""

    def decoder(x0: Array, z: Array, logsnr: ArrayLike) -> Array:
        logsnr = jnp.asarray(logsnr, z.dtype)
        square = jnp.square(x0 - z) * jnp.exp(logsnr)
        return 0.5 * (logsnr - math.log(2 * math.pi) - square)

    return decoder


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianLikelihood:
    """Upper bound on the negative log-likelihood of a data set, with standard errors.

    Rows are pooled before any ratio; a dimension is an eligible element. ``standard_error_*`` is
    Monte Carlo error (NaN for one replicate), ``data_standard_error_*`` is from the spread of rows.

    Attributes:
        replicate_row_parts: [3, R, N] float64 nats, reconstruction, diffusion and prior of each
            scored row in each replicate. The prior has no Monte Carlo error.
        row_elements, row_index: [N] eligible elements of each scored row, its number in the stream.
        rows_seen: rows in the stream, those without eligible elements included.
        passes: F, forward passes per row and replicate.
    """

    replicate_row_parts: np.ndarray
    row_elements: np.ndarray
    row_index: np.ndarray
    rows_seen: int
    passes: int

    @property
    def replicates(self) -> int:
        return self.replicate_row_parts.shape[1]

    @property
    def rows(self) -> int:
        return self.row_elements.shape[0]

    @property
    def elements(self) -> int:
        return int(self.row_elements.sum())

    @property
    def per_row_nats(self) -> np.ndarray:
        """[N] bound of each scored row."""
        return self.replicate_row_parts.sum(0).mean(0)

    @property
    def nats(self) -> float:
        return float(self.per_row_nats.sum())

    @property
    def nats_per_dimension(self) -> float:
        return self.nats / self.elements

    @property
    def bits_per_dimension(self) -> float:
        return self.nats_per_dimension / _LN2

    @property
    def parts_bits_per_dimension(self) -> dict[str, float]:
        totals = self.replicate_row_parts.mean(1).sum(1) / (self.elements * _LN2)
        return dict(zip(PARTS, map(float, totals)))

    @property
    def standard_error_parts_bits_per_dimension(self) -> dict[str, float]:
        bits = self.replicate_row_parts.sum(2) / (self.elements * _LN2)
        return dict(zip(PARTS, map(standard_error_of_mean, bits)))

    @property
    def standard_error_nats(self) -> float:
        return standard_error_of_mean(self.replicate_row_parts.sum((0, 2)))

    @property
    def standard_error_nats_per_dimension(self) -> float:
        return self.standard_error_nats / self.elements

    @property
    def standard_error_bits_per_dimension(self) -> float:
        return self.standard_error_nats_per_dimension / _LN2

    @property
    def data_standard_error_nats_per_dimension(self) -> float:
        return standard_error_of_ratio(self.per_row_nats, self.row_elements)

    @property
    def data_standard_error_bits_per_dimension(self) -> float:
        return self.data_standard_error_nats_per_dimension / _LN2

    def to_dict(self) -> dict:
        """Everything but the per-row arrays as JSON values; undefined numbers become None."""
        counts = ("rows", "rows_seen", "elements", "passes", "replicates")
        names = ("nats", "nats_per_dimension", "bits_per_dimension")
        names += tuple(f"standard_error_{name}" for name in names)
        names += tuple(f"data_standard_error_{unit}_per_dimension" for unit in ("nats", "bits"))
        result = {name: getattr(self, name) for name in counts}
        result |= {name: finite_or_none(getattr(self, name)) for name in names}
        for name in ("parts_bits_per_dimension", "standard_error_parts_bits_per_dimension"):
            result[name] = {k: finite_or_none(v) for k, v in getattr(self, name).items()}
        return result

    def summary(self) -> str:
        errors = self.standard_error_parts_bits_per_dimension
        lines = [
            f"likelihood bound over {self.rows} rows, {self.elements} dimensions"
            f" ({self.rows_seen - self.rows} rows without eligible elements left out)",
            f"  bits per dimension {self.bits_per_dimension:.4f}"
            f" ± {self.standard_error_bits_per_dimension:.4f}"
            f" (data ± {self.data_standard_error_bits_per_dimension:.4f})",
        ]
        for name, value in self.parts_bits_per_dimension.items():
            lines.append(f"    {name:<16} {value:.4f} ± {errors[name]:.4f}")
        design = f"{self.replicates} replicates of {self.passes} passes per row"
        lines.append(f"  (± Monte Carlo standard error from {design}; data: spread over rows)")
        return "\n".join(lines)


def make_gaussian_likelihood(
    apply_fn: Callable[..., Array],
    *,
    output: Output,
    path: Path,
    decoder: Decoder,
    low: float,
    high: float,
    passes: int,
    replicates: int = 8,
    values: Callable[[Array], Array] | None = None,
) -> Callable[..., GaussianLikelihood]:
    """Compile an estimator of the likelihood bound. Ineligible elements are clean and unscored.

    F levels per row, one in each of F equal cells of [low, high], repeated R times with fresh
    randomness. Constant weight: for N(0, 1) data on [-10, 10] and many cells the variance is 1.8
    times the least of any level density. ValueError for passes or replicates below 1, levels not
    finite with low < high, batches of different shapes, or no eligible element in all the data.

    Args:
        apply_fn: ``apply_fn(params, x [B, L], logsnr [B, 1], documents) -> y [B, L]``.
        decoder: p(x0 | z_high), such as ``grey_value_decoder(256)``.
        low, high: noisiest and cleanest logSNR. The prior term shows whether ``low`` is low enough;
            for 256 grey values ``high`` is about 13.
        passes, replicates: F and R; R >= 8 for a usable standard error.
        values: elementwise map from ``batch.tokens`` to data, such as ``scaled_integers(256)``.
            Without it the tokens are float data, and the bound is on their density.

    Returns:
        ``evaluate(params, key, batches, progress=None) -> GaussianLikelihood``. A row's randomness
        depends on key and number in the stream only. ``progress(rows)`` runs after each batch.
    """
    check_at_least_one(passes=passes, replicates=replicates)
    check_interval("make_gaussian_likelihood", low, high)
    check_finite("make_gaussian_likelihood", low=low, high=high)

    @jax.jit
    def score(params, key, batch, first_row, replicate):
        data = jnp.asarray(batch.tokens if values is None else values(batch.tokens))
        check_float(data)
        eligible = jnp.asarray(batch.eligible)
        keys = replicate_keys(key, first_row, data.shape[0], replicate)

        def random_numbers(row_key: Array, j: Array) -> tuple[Array, Array]:
            pass_key = jax.random.fold_in(row_key, j)
            offset = jax.random.uniform(stream(pass_key, "level"), (1,), data.dtype)
            shape = (2, *data.shape[1:])
            return offset, jax.random.normal(stream(pass_key, "noise"), shape, data.dtype)

        def one_pass(total: tuple[Array, Array], j: Array) -> tuple[tuple[Array, Array], None]:
            offset, noise = jax.vmap(random_numbers, (0, None))(keys, j)
            eps, decoder_noise = noise[:, 0], noise[:, 1]
            logsnr = low + (high - low) * (j + offset) / passes
            x = jnp.where(eligible, path.alpha(logsnr) * data + path.sigma(logsnr) * eps, data)
            y = apply_fn(params, x, logsnr, batch.documents)
            error = y.astype(data.dtype) - output.target(path, logsnr, data, eps)
            square = jnp.square(error) * jnp.exp(-output.log_eps_weight(path, logsnr))
            z = data + math.exp(-0.5 * high) * decoder_noise
            terms = (-decoder(data, z, high), 0.5 * (high - low) * square)
            sums = (jnp.sum(jnp.where(eligible, term, 0.0), -1) for term in terms)
            return tuple(t + s / passes for t, s in zip(total, sums)), None

        zero = jnp.zeros(data.shape[0], data.dtype)
        (reconstruction, diffusion), _ = jax.lax.scan(one_pass, (zero, zero), jnp.arange(passes))
        prior = jnp.sum(jnp.where(eligible, prior_divergence(data, low), 0.0), -1)
        return jnp.stack([reconstruction, diffusion, prior])

    def evaluate(
        params: PyTree,
        key: Array,
        batches: Iterable[Batch],
        progress: Callable[[int], None] | None = None,
    ) -> GaussianLikelihood:
        key = stream(key, "gaussian_likelihood")

        def score_all(batch: Batch, first_row: int, _rows: ScoredRows) -> list:
            return [score(params, key, batch, first_row, r) for r in range(replicates)]

        def collect(estimates: list, rows: ScoredRows) -> tuple[np.ndarray, ScoredRows]:
            return np.array(estimates, np.float64).swapaxes(0, 1)[..., rows.batch_index], rows

        parts, seen = score_batches(params, batches, score_all, collect, progress, "element")
        return GaussianLikelihood(
            replicate_row_parts=np.concatenate([part for part, _ in parts], axis=-1),
            row_elements=np.concatenate([rows.size for _, rows in parts]),
            row_index=np.concatenate([rows.index for _, rows in parts]),
            rows_seen=seen,
            passes=passes,
        )

    return evaluate


def prior_divergence(data: Array, logsnr: float) -> Array:
    """KL of the noisy data at a level from N(0, 1), nats per element; variance-preserving."""
    kept = survival_probability(logsnr).astype(data.dtype)
    log_noise = log_masking_rate(logsnr).astype(data.dtype)
    # sigma^2 - 1 = -alpha^2, so nothing cancels but the logarithm's first order.
    return 0.5 * (kept * (jnp.square(data) - 1) - log_noise)


class OdeLikelihood(NamedTuple):
    """Log densities under the probability flow.

    Attributes:
        log_density: [B] log p of each row at the cleanest level of the grid, nats.
        standard_error: [B] of the divergence over its probes, without the integration error (refine
            the grid for that); 0 if exact, NaN for one probe.
        latent: [B, ...] the row at the noisiest level, variance-preserving.
    """

    log_density: Array
    standard_error: Array
    latent: Array


def ode_likelihood(
    key: Array,
    model_fn: ModelFn,
    data: ArrayLike,
    grid: ArrayLike,
    *,
    output: Output,
    path: Path,
    probes: int | None = None,
    documents: ArrayLike | None = None,
    row_offset: ArrayLike = 0,
) -> OdeLikelihood:
    """Log density of each row by the probability flow; jit-able.

    In variance-preserving coordinates, with the denoiser D a function of ``z = x / alpha``,

        dx / dlambda = -1/2 sigmoid(lambda) x + 1/2 alpha D(z, lambda) ,
        dlog p / dlambda = 1/2 sum_i [sigmoid(lambda) - dD_i / dz_i] ,

    from the cleanest level to the noisiest, N(0, 1), by Runge-Kutta of order 4, one step per grid
    interval. It is the density of data plus noise of variance exp(-grid[-1]). Discrete data have
    none: dequantise them, and the result bounds their probability. Song et al. 2021 (arXiv
    2011.13456), appendix D.2; FFJORD (Grathwohl et al. 2019) for the estimated divergence.
    ValueError for probes below 1, data without rows, or a bad grid where concrete.

    Args:
        key, row_offset: row i draws from ``fold_in(key, row_offset + i)`` alone; only for probes.
        model_fn, output, path, documents: as in
            :func:`~mdm_jax.gaussian.samplers.sample_gaussian`; rows must not influence each other.
        grid: [N + 1] finite logSNR levels, increasing.
        probes: Rademacher vectors of Hutchinson's estimate of the divergence; None is exact, at the
            cost of a derivative per element.
    """
    data = jnp.asarray(data)
    if probes is not None and probes < 1:
        raise ValueError(f"probes must be at least 1, or None for the exact trace, got {probes}")
    if data.ndim < 2 or data.size == 0 or not jnp.issubdtype(data.dtype, jnp.floating):
        raise ValueError(
            f"ode_likelihood needs float data [rows, elements, ...], got {data.dtype} {data.shape}"
        )
    if is_concrete(grid):
        check_levels(grid)
    levels = jnp.asarray(grid, data.dtype)
    denoise = bind_denoiser(model_fn, output, path, documents)
    elements = math.prod(data.shape[1:])
    directions = _directions(key, data, probes, row_offset)

    def velocity(x: Array, logsnr: Array) -> tuple[Array, Array]:
        """dx / dlambda [B, ...] and dlog p / dlambda [P, B]."""
        z = x * jnp.exp(-_VP.log_alpha(logsnr))
        x0, tangent = jax.linearize(lambda z: denoise(path.alpha(logsnr) * z, logsnr), z)

        def quadratic_form(direction: Array) -> Array:
            direction = jnp.broadcast_to(direction, z.shape)
            return jnp.sum((direction * tangent(direction)).reshape(z.shape[0], -1), axis=-1)

        trace = jax.lax.map(quadratic_form, directions)
        if probes is None:
            trace = jnp.sum(trace, axis=0, keepdims=True)
        kept = jax.nn.sigmoid(logsnr)
        return 0.5 * (_VP.alpha(logsnr) * x0 - kept * x), 0.5 * (elements * kept - trace)

    def step(carry: tuple[Array, Array], ends: tuple[Array, Array]):
        (x, total), (clean, noisy) = carry, ends
        size = noisy - clean
        middle = clean + 0.5 * size
        first = velocity(x, clean)
        second = velocity(x + 0.5 * size * first[0], middle)
        third = velocity(x + 0.5 * size * second[0], middle)
        fourth = velocity(x + size * third[0], noisy)
        move, gain = (
            size / 6 * (a + 2 * b + 2 * c + d) for a, b, c, d in zip(first, second, third, fourth)
        )
        return (x + move, total - gain), None

    start = data * _VP.alpha(levels[-1])
    total = jnp.zeros((1 if probes is None else probes, data.shape[0]), data.dtype)
    (latent, total), _ = jax.lax.scan(step, (start, total), (levels[:0:-1], levels[-2::-1]))
    flat = latent.reshape(data.shape[0], -1)
    prior = -0.5 * jnp.sum(jnp.square(flat) + math.log(2 * math.pi), axis=-1)
    log_density = prior + jnp.mean(total, axis=0) + elements * _VP.log_alpha(levels[-1])
    if probes is None:
        error = jnp.zeros_like(log_density)
    elif probes == 1:
        error = jnp.full_like(log_density, jnp.nan)
    else:
        error = jnp.std(total, axis=0, ddof=1) / math.sqrt(probes)
    return OdeLikelihood(log_density, error, latent)


def _directions(key: Array, data: Array, probes: int | None, row_offset: ArrayLike) -> Array:
    """[P, B, ...] probes, the same along the whole trajectory; [elements, 1, ...] unit vectors."""
    event = data.shape[1:]
    if probes is None:
        return jnp.eye(math.prod(event), dtype=data.dtype).reshape(-1, 1, *event)
    keys = row_streams(row_keys(key, row_offset, data.shape[0]), "probes")
    signs = jax.vmap(lambda k: jax.random.rademacher(k, (probes, *event), data.dtype))(keys)
    return jnp.swapaxes(signs, 0, 1)
