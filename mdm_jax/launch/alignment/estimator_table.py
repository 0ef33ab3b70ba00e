"""Tables of ``mdm variance`` for runs on preferences and rewards."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mdm_jax.alignment.methods import METHODS
from mdm_jax.estimates import finite_or_none
from mdm_jax.launch.modes.variance_report import format_table
from mdm_jax.meter.subject import Estimator
from mdm_jax.variance.transform import VarianceTransform

BUDGETS = (1, 2, 4, 8, 16, 32)
"""Forward passes of an answer that methods are compared at."""


class Kind(NamedTuple):
    """A method's estimator and draws, or why it has none."""

    estimator: Estimator | None
    transform: VarianceTransform | None
    refused: str


class Moments(NamedTuple):
    """Of the gradient of a batch of answers over redraws: trace of the covariance, squared norm of
    the mean and inner product of the mean with the trace's mean, both unbiased."""

    variance: float
    signal: float
    product: float


def summarise(
    kinds: Mapping[str, Kind], groups: Sequence[Mapping[str, Moments]]
) -> dict[str, dict[str, Any]]:
    """JSON values of each method, from the moments of each batch; errors by the jackknife over
    batches. ``cosine`` is None where the trace is missing or no signal is left."""
    record = {}
    for method, kind in kinds.items():
        label = METHODS[method].policy_gradient
        if kind.refused:
            record[method] = {"policy_gradient": label, "refused": kind.refused}
            continue
        passes = METHODS[method].passes * kind.transform.views
        own = np.array([group[method] for group in groups])  # [G, 3]
        truth = np.array([g["trace"].signal if "trace" in g else math.nan for g in groups])
        figures = np.array(
            [_figures(own, truth)] + [
                _figures(np.delete(own, g, 0), np.delete(truth, g)) for g in range(len(groups))
            ]
        )  # fmt: skip
        rest = figures[1:]
        errors = np.sqrt((len(rest) - 1) * rest.var(0)) if len(rest) > 1 else [math.nan] * 2
        noise, cosine = figures[0]
        record[method] = {
            "policy_gradient": label,
            "refused": "",
            "passes": passes,
            "noise_to_signal_times_passes": finite_or_none(noise * passes),
            "noise_to_signal_times_passes_standard_error": finite_or_none(errors[0] * passes),
            "cosine": finite_or_none(cosine),
            "cosine_standard_error": finite_or_none(errors[1]),
            "cosine_at_passes": {
                str(budget): finite_or_none(cosine / math.sqrt(1 + noise * passes / budget))
                for budget in BUDGETS
                if budget >= passes and noise >= 0
            },
        }
    return record


def _figures(own: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """(noise over signal, cosine) of moments [G, 3] and the trace's signals [G]; NaN without."""
    variance, signal, product = own.sum(0)
    whole = signal * truth.sum()
    noise = variance / signal if signal > 0 else math.nan
    return noise, product / math.sqrt(whole) if signal > 0 and whole > 0 else math.nan


def format_tables(record: Mapping[str, Any]) -> str:
    """All tables of a record of ``variance.measure``, for the terminal."""
    texts = [format_table(record), _sources(record)]
    if record["sharing"]:
        texts.append(_sharing(record["sharing"]))
    if record["estimators"]:
        texts.append(_estimators(record["estimators"], record["batch_size"]))
    return "\n\n".join(texts)


def _sources(record: Mapping[str, Any]) -> str:
    """Scores and gradients of one row by source, shares of their variance."""
    pairs = record["answers"] == 1
    header = ("chain", "of", "variance", "masks", "levels", "pairs" if pairs else "answers")
    rows = [(*header, *(() if pairs else ("prompts",)))]
    for name, result in record["methods"].items():
        for of in ("score", "loss", "gradient"):
            parts = result[of]
            if not parts:
                continue
            total, error = parts["total"], parts["total_standard_error"]
            values = [parts["pattern"], parts["rate"]]
            within = parts["within"]
            values += [parts["data"]] if pairs else [within, parts["data"] - within]
            shown = f"{total:.4g}" + ("" if error is None else f" ± {error:.2g}")
            rows.append((name, of, shown, *(f"{v / total:.0%}" if total else "" for v in values)))
    return "variance of one row (all its views) by source\n" + _aligned(rows)


def _sharing(found: Mapping[str, Any]) -> str:
    shown = [
        f"{found[name]:.4g} ± {_or_nan(found[f'{name}_standard_error']):.2g}"
        for name in ("shared", "independent")
    ]
    if found["shared"] == 0:
        factor = "nothing is left: policy and reference are equal"
    elif found["shared"] < 0:
        factor = "what is left is not told from nothing; take more draws or rows"
    else:
        factor = f"{found['factor']:.3g} times less"
    return (
        "variance of a pair's margin by masks and levels, nats squared: policy and reference on\n"
        f"the same masks {shown[0]}, on masks of their own {shown[1]}: {factor}"
    )


def _estimators(found: Mapping[str, Any], rows: int) -> str:
    budgets = [str(budget) for budget in BUDGETS]
    header = ("method", "policy gradient", "passes", "noise/signal x passes", "cosine", *budgets)
    lines = [header]
    best = {
        budget: max((m.get("cosine_at_passes", {}).get(budget) or -1.0) for m in found.values())
        for budget in budgets
    }
    for method, figures in found.items():
        if figures["refused"]:
            why = f"not measured: {figures['refused']}"
            lines.append((method, figures["policy_gradient"], "", why, "", *[""] * len(budgets)))
            continue
        noise, cosine = (
            "no signal" if figures[name] is None else
            f"{figures[name]:.3g} ± {_or_nan(figures[f'{name}_standard_error']):.2g}"
            for name in ("noise_to_signal_times_passes", "cosine")
        )  # fmt: skip
        cells = []
        for budget in budgets:
            value = figures["cosine_at_passes"].get(budget)
            mark = "*" if value is not None and value == best[budget] else ""
            cells.append("" if value is None else f"{value:.2f}{mark}")
        lines.append(
            (method, figures["policy_gradient"], str(figures["passes"]), noise, cosine, *cells)
        )
    return (
        f"methods on batches of the same {rows} answers, masks drawn anew: cosine of the mean\n"
        "gradient of these answers with that of traces, and of one of so many passes an answer\n"
        "(* the highest); the noise of the answers themselves is in none of these\n"
        + _aligned(lines)
    )


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells as columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
