"""Columns of tables: numbers and categories as integer codes, and back."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

NUM_VALUES = 2**16
"""Codes of a numeric column, evenly spaced over twice the range of its training rows."""


@dataclasses.dataclass(frozen=True)
class Column:
    """A column: ``categories`` by code, or (none) a number, ``low + step * code``.

    ``mean`` and ``std`` are of the training rows' numbers; ``frequencies`` [C] of their categories.
    """

    name: str
    categories: tuple[str, ...] = ()
    low: float = 0.0
    step: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    frequencies: tuple[float, ...] = ()

    @property
    def is_numeric(self) -> bool:
        return not self.categories

    @property
    def entropy(self) -> float:
        """Of the categories' frequencies, nats."""
        shares = np.array([f for f in self.frequencies if f > 0])
        return float(-(shares * np.log(shares)).sum())

    def encode(self, values: Sequence[Any]) -> np.ndarray:
        """Codes [N] int32 of values; numbers beyond the codes get the nearest.

        ValueError for an unknown category, or what is no finite number.
        """
        if self.is_numeric:
            codes = np.round((finite_numbers(self.name, values) - self.low) / self.step)
            return np.clip(codes, 0, NUM_VALUES - 1).astype(np.int32)
        index = {category: code for code, category in enumerate(self.categories)}
        unknown = sorted({str(value) for value in values} - index.keys())
        if unknown:
            raise ValueError(
                f"column {self.name!r} has the categories {', '.join(self.categories)}, not "
                f"{', '.join(unknown[:3])}"
            )
        return np.array([index[str(value)] for value in values], np.int32)

    def decode(self, codes: ArrayLike) -> np.ndarray:
        """Values [N] of codes: float64 numbers, within ``step / 2``, or categories."""
        codes = np.asarray(codes)
        if self.is_numeric:
            return self.low + self.step * codes.astype(np.float64)
        return np.array(self.categories, object)[codes]


def decoded(columns: Sequence[Column], codes: ArrayLike) -> dict[str, np.ndarray]:
    """Values by column of codes [N, L]."""
    codes = np.asarray(codes)
    return {c.name: c.decode(codes[:, i]) for i, c in enumerate(columns)}


def as_csv(columns: Sequence[Column], codes: ArrayLike) -> str:
    """Rows of codes [N, L] as CSV with a header; numbers with six digits."""
    found = decoded(columns, codes)
    lines = [list(found)]
    for row in zip(*found.values()):
        lines.append([f"{v:.6g}" if c.is_numeric else v for c, v in zip(columns, row)])
    return "".join(",".join(_quoted(cell) for cell in line) + "\n" for line in lines)


def _quoted(cell: str) -> str:
    plain = not any(mark in cell for mark in ',"\n\r')
    return cell if plain else '"' + cell.replace('"', '""') + '"'


def finite_numbers(name: str, values: Sequence[Any]) -> np.ndarray:
    """Values as float64 [N]; ValueError names the column and the row of one that is not finite."""
    numbers = np.asarray(values, np.float64)
    if not np.all(np.isfinite(numbers)):
        where = int(np.argmin(np.isfinite(numbers)))
        raise ValueError(f"column {name!r}: row {where} holds {numbers[where]}, no finite number")
    return numbers
