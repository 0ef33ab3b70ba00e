"""Tables from CSV files and from scikit-learn."""

import csv
import dataclasses
import hashlib
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mdm_jax.checks import checked, missing_package
from mdm_jax.data.datasets import Dataset, Fractions, make_dataset, shuffled_split
from mdm_jax.data.records import read_text
from mdm_jax.data.rows import PictureRows
from mdm_jax.data.tables.column import NUM_VALUES, Column, finite_numbers

_SPLIT_SEED = 0


def table_dataset(
    values: Mapping[str, Sequence[Any]],
    *,
    origin: str,
    headline: str,
    settings: Mapping[str, Any],
    fractions: Sequence[float] = (0.6, 0.1, 0.3),
) -> Dataset:
    """Dataset of the columns ``values`` by name, rows shuffled with a fixed seed and split.

    A column of numbers is numeric, any other categorical, of categories sorted by name. ``origin``
    is for messages. ValueError for columns of different lengths, missing values, and columns that
    are constant in the training rows.
    """
    sizes = {name: len(column) for name, column in values.items()}
    if len(set(sizes.values())) != 1 or not next(iter(sizes.values())):
        raise ValueError(f"{origin}: columns must have equally many rows, and some; got {sizes}")
    count = next(iter(sizes.values()))
    parts = shuffled_split(count, fractions, _SPLIT_SEED, origin, "rows")
    columns = tuple(
        _column(origin, name, column, parts["train"]) for name, column in values.items()
    )
    codes = np.stack([c.encode(values[c.name]) for c in columns], axis=1)
    clipped = sum(
        int(
            np.sum(
                abs(c.decode(c.encode(values[c.name])) - finite_numbers(c.name, values[c.name]))
                > c.step
            )
        )
        for c in columns
        if c.is_numeric
    )
    largest = max(NUM_VALUES if c.is_numeric else len(c.categories) for c in columns)
    kinds = [c.name if c.is_numeric else f"{c.name} ({len(c.categories)})" for c in columns]
    return make_dataset(
        {name: PictureRows(codes[rows]) for name, rows in parts.items()},
        None,
        vocab_size=largest + 1,
        length=len(columns),
        digest=hashlib.sha256(codes.tobytes()).digest(),
        settings={**settings, "columns": [dataclasses.asdict(c) for c in columns]},
        headline=headline,
        policy=f"Columns, with the number of categories: {', '.join(kinds)}.",
        report={f"{name}_rows": len(rows) for name, rows in parts.items()}
        | {"numbers_beyond_the_codes": clipped},
        columns=columns,
    )


@checked
def table(path: str, fractions: Fractions = (0.6, 0.1, 0.3)) -> Dataset:
    """A CSV file with a header (:func:`read_text`); see :func:`table_dataset`.

    ValueError names file and line.
    """
    lines = csv.reader(io.StringIO(read_text(path).content, newline=""))
    header, rows = next(lines), []
    if len(header) < 2 or len(set(header)) < len(header):
        raise ValueError(f"{path}: line 1 must name two or more different columns, got {header}")
    for row in lines:
        if len(row) != len(header) or not all(cell.strip() for cell in row):
            raise ValueError(
                f"{path}, line {lines.line_num}: {len(header)} values are needed, none of them "
                f"empty, got {row}; leave the row out, or fill in its missing values"
            )
        rows.append(row)
    return table_dataset(
        {name: _parsed([row[i].strip() for row in rows]) for i, name in enumerate(header)},
        origin=path,
        headline=f"{pathlib.PurePath(path).name}, {len(rows)} rows.",
        settings={"source": "table", "fractions": list(fractions)},
        fractions=fractions,
    )


@checked
def diabetes(fractions: Fractions = (0.6, 0.1, 0.3)) -> Dataset:
    """Scikit-learn's table of 442 diabetes patients, with four of its columns as categories.

    Categorical: sex (the table says 1 and 2), age in decades and body mass index in the WHO's four
    classes, both in place of the number, and s4 (about total cholesterol over HDL), rounded, 7 and
    more together. Numeric: blood pressure, five serum measurements, disease progression after a
    year. Source: Efron et al. 2004, shipped with scikit-learn (BSD-3).
    """
    try:
        from sklearn.datasets import load_diabetes
    except ImportError as error:
        raise missing_package("the diabetes source", "digits", error) from error
    raw = load_diabetes(scaled=False)
    column = {name: raw.data[:, i] for i, name in enumerate(raw.feature_names)}
    classes = np.array(["bmi under 18.5", "bmi 18.5 to 25", "bmi 25 to 30", "bmi 30 and more"])
    return table_dataset(
        {
            "sex": [f"sex {int(v)}" for v in column["sex"]],
            "age_decade": [f"{10 * int(v // 10)}s" for v in column["age"]],
            "bmi_class": classes[np.digitize(column["bmi"], [18.5, 25.0, 30.0])].tolist(),
            "s4_rounded": [f"s4 {min(round(v), 7)}" for v in column["s4"]],
            **{name: column[name] for name in ("bp", "s1", "s2", "s3", "s5", "s6")},
            "progression": raw.target,
        },
        origin="diabetes",
        headline="Diabetes patients from scikit-learn (Efron et al. 2004), 442 rows; age, body "
        "mass index and s4 made categorical.",
        settings={"source": "diabetes", "fractions": list(fractions)},
        fractions=fractions,
    )


def _parsed(cells: list[str]) -> Sequence[Any]:
    try:
        return np.array([float(cell) for cell in cells])
    except ValueError:
        return cells


def _column(origin: str, name: str, values: Sequence[Any], train: np.ndarray) -> Column:
    if not all(isinstance(v, int | float | np.number) for v in values):
        categories, count = np.unique([str(values[i]) for i in train], return_counts=True)
        every = tuple(sorted({str(v) for v in values}))
        if len(categories) < 2:
            raise ValueError(f"{origin}: column {name!r} is constant in the training rows")
        seen = dict(zip(categories, count / count.sum()))
        return Column(name, every, frequencies=tuple(float(seen.get(c, 0.0)) for c in every))
    numbers = finite_numbers(f"{name} of {origin}", values)[train]
    low, high = numbers.min(), numbers.max()
    if not high > low:
        raise ValueError(f"{origin}: column {name!r} is constant in the training rows")
    step = 2 * (high - low) / (NUM_VALUES - 1)
    return Column(
        name,
        low=float(low - (high - low) / 2),
        step=float(step),
        mean=float(numbers.mean()),
        std=float(numbers.std()),
    )
