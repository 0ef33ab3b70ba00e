"""Laws of the clean data given the cleanest noisy version: the last term of a Gaussian bound.

A decoder is ``decoder(x0 [..., L], z [..., L], logsnr) -> log p [..., L]``, nats per element, with
``z = x0 + exp(-logsnr / 2) eps``. Any normalised law makes a valid bound; these need no network.

The Gaussian diffusion bound of held-out data, in its three parts and with error bars.

Between a noisiest level ``low`` and a cleanest level ``high`` the bound of a row is

    NELBO(x0) = E[-log p(x0 | z_high)]                              reconstruction
              + 1/2 int_low^high E|eps - eps_hat|^2 dlambda         diffusion
              + KL(q(x_low | x0) || N(0, 1))                        prior, variance-preserving,

nats, whatever the path of the network. The estimator is fixed and knows nothing of the training
chain: F levels per row, one in each of F equal cells of [low, high]. Uniform in the logSNR the
weight is constant, so that a network's errors at noisy levels are never multiplied. For normal data
of unit variance on [-10, 10] and many cells, the variance is 1.8 times the least that any density
of levels could reach.

The whole design is repeated R times with fresh randomness; the spread of the totals gives the
Monte Carlo standard error. Kingma et al. 2021 (VDM), equations 11 to 17.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.checks import check_finite, check_interval
from mdm_jax.estimates import finite_or_none, standard_error_of_mean, standard_error_of_ratio
from mdm_jax.gaussian.objective import scaled_integers
from mdm_jax.gaussian.parameterisations import Output
from mdm_jax.gaussian.paths import Path
from mdm_jax.likelihood.estimators import ScoredRows, check_at_least_one, score_batches
from mdm_jax.rng import stream
from mdm_jax.schedules.coordinates import log_masking_rate, survival_probability
from mdm_jax.types import Array, ArrayLike, Batch, PyTree

Decoder = Callable[[Array, Array, ArrayLike], Array]
"""``decoder(x0, z, logsnr) -> log probability`` (or density) of each element, nats."""


def grey_value_decoder(num_values: int) -> Decoder:
    """Over K equally spaced values from -1 to 1, in proportion to N(z; value, exp(-logsnr)).

    This is the exact posterior for values that are uniform a priori and independent; the bound on
    pictures is tight where exp(-logsnr / 2) is small against their distance 2 / (K - 1).
    Kingma et al. 2021 (VDM), equation 13 and appendix.

    Args:
        num_values: K, as for ``objectives.scaled_integers(K)``, which makes x0.

    Raises:
        ValueError: unless num_values >= 2.
    """
    to_values = scaled_integers(num_values)

    def decoder(x0: Array, z: Array, logsnr: ArrayLike) -> Array:
        values = to_values(jnp.arange(num_values)).astype(z.dtype)
        precision = jnp.exp(jnp.asarray(logsnr, z.dtype))

        def log_odds(value: Array) -> Array:
            # log N(z; value) - log N(z; x0), as a product: no difference of large squares.
            return 0.5 * precision * (value - x0) * (2 * z - value - x0)

        def add(total: Array, value: Array) -> tuple[Array, None]:
            return jnp.logaddexp(total, log_odds(value)), None

        # One value at a time: K numbers per element would not fit for pictures.
        total, _ = jax.lax.scan(add, jnp.full_like(z, -jnp.inf), values)
        return -total

    return decoder


def normal_decoder() -> Decoder:
    """N(x0; z, exp(-logsnr)): for continuous data that are smooth at the scale of the noise."""

    def decoder(x0: Array, z: Array, logsnr: ArrayLike) -> Array:
        logsnr = jnp.asarray(logsnr, z.dtype)
        square = jnp.square(x0 - z) * jnp.exp(logsnr)
        return 0.5 * (logsnr - math.log(2 * math.pi) - square)

    return decoder


PARTS = ("reconstruction", "diffusion", "prior")

_LN2 = math.log(2.0)


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianLikelihood:
    """An upper bound on the negative log-likelihood of a data set, with its uncertainty.

    Rows are pooled before any ratio is taken. ``standard_error_*`` is the Monte Carlo error, from
    the spread over replicates (NaN for one replicate). ``data_standard_error_*`` is the spread over
    rows, taken as independent: what another sample of as many rows might change.

    Attributes:
        replicate_row_parts: [3, R, N] float64, each replicate's estimate of each scored row's
            reconstruction, diffusion and prior terms, nats. The prior has no Monte Carlo error.
        row_elements: [N] eligible elements of each scored row: its dimensions.
        row_index: [N] number of each scored row in the data stream.
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
        """R, independent repetitions of the design."""
        return self.replicate_row_parts.shape[1]

    @property
    def rows(self) -> int:
        """Number of scored rows."""
        return self.row_elements.shape[0]

    @property
    def elements(self) -> int:
        """Number of scored elements, the dimensions of "bits per dimension"."""
        return int(self.row_elements.sum())

    @property
    def per_row_nats(self) -> np.ndarray:
        """[N] bound of each scored row, nats."""
        return self.replicate_row_parts.sum(0).mean(0)

    @property
    def nats(self) -> float:
        """Bound of the whole data set, nats."""
        return float(self.per_row_nats.sum())

    @property
    def nats_per_dimension(self) -> float:
        """Total nats over total elements."""
        return self.nats / self.elements

    @property
    def bits_per_dimension(self) -> float:
        """Total bits over total elements."""
        return self.nats_per_dimension / _LN2

    @property
    def parts_bits_per_dimension(self) -> dict[str, float]:
        """Each part's share of ``bits_per_dimension``, by its name."""
        totals = self.replicate_row_parts.mean(1).sum(1) / (self.elements * _LN2)
        return dict(zip(PARTS, map(float, totals)))

    @property
    def standard_error_parts_bits_per_dimension(self) -> dict[str, float]:
        """Monte Carlo standard error of each part."""
        errors = [
            standard_error_of_mean(part.sum(1)) / (self.elements * _LN2)
            for part in self.replicate_row_parts
        ]
        return dict(zip(PARTS, errors))

    @property
    def standard_error_nats(self) -> float:
        """Monte Carlo standard error of ``nats``."""
        return standard_error_of_mean(self.replicate_row_parts.sum((0, 2)))

    @property
    def standard_error_nats_per_dimension(self) -> float:
        """Monte Carlo standard error of ``nats_per_dimension``."""
        return self.standard_error_nats / self.elements

    @property
    def standard_error_bits_per_dimension(self) -> float:
        """Monte Carlo standard error of ``bits_per_dimension``."""
        return self.standard_error_nats_per_dimension / _LN2

    @property
    def data_standard_error_nats_per_dimension(self) -> float:
        """Standard error of ``nats_per_dimension`` from the spread over rows."""
        return standard_error_of_ratio(self.per_row_nats, self.row_elements)

    @property
    def data_standard_error_bits_per_dimension(self) -> float:
        """Standard error of ``bits_per_dimension`` from the spread over rows."""
        return self.data_standard_error_nats_per_dimension / _LN2

    def to_dict(self) -> dict:
        """Everything but the per-row arrays as JSON values; undefined numbers become None."""
        counts = ("rows", "rows_seen", "elements", "passes", "replicates")
        names = ("nats", "nats_per_dimension", "bits_per_dimension")
        names += tuple(f"standard_error_{name}" for name in names)
        names += tuple(f"data_standard_error_{unit}_per_dimension" for unit in ("nats", "bits"))
        parts = ("parts_bits_per_dimension", "standard_error_parts_bits_per_dimension")
        return (
            {name: getattr(self, name) for name in counts}
            | {name: finite_or_none(getattr(self, name)) for name in names}
            | {
                name: {k: finite_or_none(v) for k, v in getattr(self, name).items()}
                for name in parts
            }
        )

    def summary(self) -> str:
        """A few lines for the terminal."""
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
    """Evaluation of the bound; the forward pass is compiled once.

    Elements that are not eligible are given clean and are not scored.

    Args:
        apply_fn: ``apply_fn(params, x [B, L], logsnr [B, 1], documents) -> y [B, L]``.
        output: what the network predicts.
        path: of the network's inputs.
        decoder: p(x0 | z_high), such as ``grey_value_decoder(256)``.
        low: noisiest logSNR, finite; the prior term tells whether it is low enough.
        high: cleanest logSNR, finite. For 256 grey values about 13.
        passes: F >= 1, forward passes per row and replicate.
        replicates: R >= 1, repetitions of the design; 8 or more for a usable standard error.
        values: data from ``batch.tokens``, elementwise, such as ``scaled_integers(256)``; if not
            given the tokens are floats and are the data, and the bound is on their density.

    Returns:
        ``evaluate(params, key, batches, progress=None) -> GaussianLikelihood``. All batches have
        one shape. The randomness of a row depends on the key and its number in the stream, not on
        the batch size. ``progress(rows)`` is called after each batch.

    Raises:
        ValueError: for passes or replicates below 1, levels that are not finite with low < high,
            batches of different shapes, or no eligible element in all the data.
    """
    check_at_least_one(passes=passes, replicates=replicates)
    check_interval("make_gaussian_likelihood", low, high)
    check_finite("make_gaussian_likelihood", low=low, high=high)

    @jax.jit
    def score(params, key, batch, first_row, replicate):
        data, eligible = _data(batch, values), jnp.asarray(batch.eligible)
        rows = first_row + jnp.arange(data.shape[0])
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), replicate))(
            rows
        )

        def numbers(row_key: Array, j: Array) -> tuple[Array, Array]:
            pass_key = jax.random.fold_in(row_key, j)
            offset = jax.random.uniform(stream(pass_key, "level"), (1,), data.dtype)
            shape = (2, *data.shape[1:])
            return offset, jax.random.normal(stream(pass_key, "noise"), shape, data.dtype)

        def one_pass(total: tuple[Array, Array], j: Array) -> tuple[tuple[Array, Array], None]:
            offset, noise = jax.vmap(numbers, (0, None))(keys, j)
            eps, decoder_noise = noise[:, 0], noise[:, 1]
            logsnr = low + (high - low) * (j + offset) / passes
            x = jnp.where(eligible, path.alpha(logsnr) * data + path.sigma(logsnr) * eps, data)
            y = apply_fn(params, x, logsnr, batch.documents)
            error = y.astype(data.dtype) - output.target(path, logsnr, data, eps)
            square = jnp.square(error) * jnp.exp(-output.log_eps_weight(path, logsnr))
            z = data + math.exp(-0.5 * high) * decoder_noise
            terms = (-decoder(data, z, high), 0.5 * (high - low) * square)
            scored = (jnp.sum(jnp.where(eligible, term, 0.0), -1) for term in terms)
            return tuple(t + s / passes for t, s in zip(total, scored)), None

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
            return np.array(estimates, np.float64).swapaxes(0, 1)[..., rows.place], rows

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
    """KL of the noisy data at a level from N(0, 1), per element, nats; variance-preserving."""
    kept = survival_probability(logsnr).astype(data.dtype)
    log_noise = log_masking_rate(logsnr).astype(data.dtype)
    # sigma^2 - 1 = -alpha^2, so nothing cancels but the logarithm's first order.
    return 0.5 * (kept * (jnp.square(data) - 1) - log_noise)


def _data(batch: Batch, values: Callable[[Array], Array] | None) -> Array:
    data = jnp.asarray(batch.tokens if values is None else values(batch.tokens))
    if not jnp.issubdtype(data.dtype, jnp.floating):
        raise ValueError(
            f"the bound needs float data, got {data.dtype}; map tokens to numbers with values=, "
            "for example objectives.scaled_integers(num_values)"
        )
    return data
