"""The result of a likelihood evaluation: nats of a data set and derived figures, with errors."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from mdm_jax.estimates import finite_or_none, standard_error_of_mean, standard_error_of_ratio

_LN2 = math.log(2.0)


class LevelCurve(NamedTuple):
    """Mean cross-entropy ``nats`` [bins] of a masked token (NaN: empty bin), of ``targets`` tokens.

    Bin b holds the passes with masking rate edges[b] < k/n <= edges[b+1].
    """

    edges: np.ndarray
    nats: np.ndarray
    targets: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Likelihood:
    """An upper bound on the negative log-likelihood of a data set, with its uncertainty.

    Totals are pooled over rows before any ratio is taken. ``standard_error_*`` is the Monte Carlo
    error, from the spread over replicates of the design (NaN for one). ``data_standard_error_*`` is
    from the spread over rows, taken as independent, Monte Carlo noise included: what another sample
    of rows might change. A unit is a character, or a pixel and channel.

    Attributes:
        replicate_row_nats: [R, N] float64, each replicate's estimate of each scored row, nats.
        row_tokens, row_units, row_index: [N] eligible tokens, units of measurement and number in
            the data stream of each scored row.
        rows_seen: rows in the stream, those without eligible tokens included.
        passes: F, forward passes per row and replicate.
        levels: loss by masking rate.
    """

    replicate_row_nats: np.ndarray
    row_tokens: np.ndarray
    row_units: np.ndarray
    row_index: np.ndarray
    rows_seen: int
    passes: int
    levels: LevelCurve

    @property
    def replicates(self) -> int:
        """R, independent repetitions of the design."""
        return self.replicate_row_nats.shape[0]

    @property
    def rows(self) -> int:
        """Number of scored rows: those with eligible tokens."""
        return self.row_tokens.shape[0]

    @property
    def tokens(self) -> int:
        """Number of eligible tokens."""
        return int(self.row_tokens.sum())

    @property
    def units(self) -> int:
        """Units of the eligible tokens."""
        return int(self.row_units.sum())

    @property
    def per_row_nats(self) -> np.ndarray:
        """[N] bound of each scored row."""
        return self.replicate_row_nats.mean(0)

    @property
    def replicate_nats(self) -> np.ndarray:
        """[R] total of each replicate."""
        return self.replicate_row_nats.sum(1)

    @property
    def nats(self) -> float:
        """Bound of the whole data set."""
        return float(self.replicate_nats.mean())

    @property
    def nats_per_token(self) -> float:
        return _ratio(self.nats, self.tokens)

    @property
    def bits_per_token(self) -> float:
        return self.nats_per_token / _LN2

    @property
    def bits_per_unit(self) -> float:
        """Total bits over total units: per character, or per dimension."""
        return _ratio(self.nats, self.units) / _LN2

    @property
    def perplexity(self) -> float:
        """``exp`` of the pooled nats per token; its standard error is to first order."""
        return float(np.exp(self.nats_per_token))

    @property
    def standard_error_nats(self) -> float:
        return standard_error_of_mean(self.replicate_nats)

    @property
    def standard_error_nats_per_token(self) -> float:
        return _ratio(self.standard_error_nats, self.tokens)

    @property
    def standard_error_bits_per_token(self) -> float:
        return self.standard_error_nats_per_token / _LN2

    @property
    def standard_error_bits_per_unit(self) -> float:
        return _ratio(self.standard_error_nats, self.units) / _LN2

    @property
    def standard_error_perplexity(self) -> float:
        return self.perplexity * self.standard_error_nats_per_token

    @property
    def data_standard_error_nats_per_token(self) -> float:
        return standard_error_of_ratio(self.per_row_nats, self.row_tokens)

    @property
    def data_standard_error_bits_per_token(self) -> float:
        return self.data_standard_error_nats_per_token / _LN2

    @property
    def data_standard_error_bits_per_unit(self) -> float:
        return standard_error_of_ratio(self.per_row_nats, self.row_units) / _LN2

    def to_dict(self) -> dict:
        """JSON values of everything but the per-row arrays; undefined numbers become None."""
        names = ("nats", "nats_per_token", "bits_per_token", "bits_per_unit", "perplexity")
        errors = tuple(f"standard_error_{name}" for name in names)
        data_errors = tuple(f"data_standard_error_{name}" for name in names[1:4])
        counts = ("rows", "rows_seen", "tokens", "units", "passes", "replicates")
        levels = {
            "masking_rate_edges": self.levels.edges.tolist(),
            "nats_per_masked_token": [finite_or_none(v) for v in self.levels.nats],
            "masked_tokens": [int(v) for v in self.levels.targets],
        }
        return (
            {name: getattr(self, name) for name in counts}
            | {name: finite_or_none(getattr(self, name)) for name in names + errors + data_errors}
            | {"levels": levels}
        )

    def summary(self) -> str:
        """A few lines for the terminal."""
        design = f"{self.replicates} replicates of {self.passes} passes per row"
        lines = [
            f"likelihood bound over {self.rows} rows, {self.tokens} tokens, {self.units} units"
            f" ({self.rows_seen - self.rows} rows without eligible tokens left out)",
            _line("bits per unit", self, "bits_per_unit"),
            _line("bits per token", self, "bits_per_token"),
            _line("nats per token", self, "nats_per_token"),
            f"  perplexity      {self.perplexity:.4f} ± {self.standard_error_perplexity:.4f}",
            f"  (± Monte Carlo standard error from {design}; data: from the spread over rows)",
        ]
        return "\n".join(lines)


def _ratio(total: float, count: int) -> float:
    return total / count if count > 0 else math.nan


def _line(label: str, result: Likelihood, name: str) -> str:
    value = getattr(result, name)
    error = getattr(result, f"standard_error_{name}")
    data = getattr(result, f"data_standard_error_{name}")
    return f"  {label:<15} {value:.4f} ± {error:.4f} (data ± {data:.4f})"
