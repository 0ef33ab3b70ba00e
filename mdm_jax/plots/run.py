"""Plots of a training run, from the records of ``training.read_metrics``."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mdm_jax.plots.style import GREY, PALETTE, dress, line

PARTS = (("pattern", "A: mask pattern"), ("rate", "B: masking rate"), ("data", "C: data"))
"""Parts of the gradient's variance, and their labels."""


class Result(NamedTuple):
    """A final evaluation: its split, the step of its parameters, bits per unit and their error."""

    split: str
    step: int
    bits_per_unit: float
    standard_error: float | None = None


def training_curve(
    axes: Any,
    records: Sequence[Mapping[str, Any]],
    unit: str,
    references: Mapping[str, float] | None = None,
    *,
    result: Result | None = None,
    exact: bool = False,
    biased: bool = False,
    biased_levels: bool = False,
) -> Any:
    """Training and validation loss in bits per ``unit``, ``references``, and the final ``result``.

    ``exact``: the likelihood is no bound. ``biased``: the training loss is not comparable, and its
    label says so; ``biased_levels``: nor is that without the noise of levels. With the monitor
    "levels" the training loss is drawn without the noise of the levels too: the mean of the running
    cross-entropies of equal ranges of the noise level, in a band of two standard errors.
    """
    training = [r for r in records if r["kind"] == "train"]
    train = [(r["step"], r["bits_per_unit"]) for r in training]
    # Converts the monitor's nats per token: both units are in the training record of its step.
    units = {r["step"]: r["bits_per_unit"] / r["loss"] for r in training if r["loss"]}
    normalised = [
        (
            r["step"],
            r["normalised_loss"] * units[r["step"]],
            2 * r.get("normalised_loss_standard_error", 0.0) * units[r["step"]],
        )
        for r in records
        if r["kind"] == "monitor" and "normalised_loss" in r and r["step"] in units
    ]
    evaluated = [
        (r["step"], r["bits_per_unit"], bits_error(r)) for r in records if r["kind"] == "evaluate"
    ]
    value = "exact" if exact else "bound"
    trained, by_levels = (
        "training (no bound)" if other else "training" for other in (biased, biased_levels)
    )
    if train:
        axes.plot(*zip(*train), color=GREY, linewidth=1, label=f"{trained}, single batches")
    if normalised:
        steps, bits, band = (np.array(column) for column in zip(*normalised))
        label = f"{by_levels}, even over levels (± 2 s.e.)"
        axes.plot(steps, bits, color=PALETTE[0], linewidth=1.2, label=label)
        axes.fill_between(steps, bits - band, bits + band, color=PALETTE[0], alpha=0.2, linewidth=0)
    if evaluated:
        steps, bits, errors = zip(*evaluated)
        axes.errorbar(
            *(steps, bits, None if exact else errors),
            color=PALETTE[3],
            marker="o",
            markersize=4,
            capsize=2,
            label=f"validation ({value}{'' if exact else ' ± 1 s.e.'})",
        )
    for number, (name, reference) in enumerate((references or {}).items()):
        style = line(number + 1) | {"color": "0.25", "linewidth": 1}
        axes.axhline(reference, label=name, **style)
    if result is not None:
        axes.errorbar(
            *([result.step], [result.bits_per_unit]),
            yerr=None if exact else [result.standard_error or 0.0],
            color="black",
            marker="*",
            markersize=11,
            linestyle="none",
            capsize=2,
            label=f"{result.split} ({value}): {result.bits_per_unit:.3f}",
            zorder=5,
        )
    return dress(axes, "Loss in training and on held-out data", "step", f"bits per {unit}")


def outcome_curve(
    axes: Any,
    training: Sequence[tuple[int, float]],
    held_out: Sequence[tuple[int, float, float]],
    title: str,
    quantity: str,
) -> Any:
    """What a run on preferences or rewards is after: (step, value) in training, and (step, value,
    standard error) on held-out data."""
    if training:
        axes.plot(*zip(*training), color=GREY, linewidth=1, label="training, single batches")
    if held_out:
        axes.errorbar(
            *zip(*held_out),
            color=PALETTE[3],
            marker="o",
            markersize=4,
            capsize=2,
            label="held out ± 1 s.e.",
        )
    return dress(axes, title, "step", quantity)


def bits_error(record: Mapping[str, Any]) -> float:
    """Standard error of a record's bits per unit, 0 without; runs of old called it otherwise."""
    return record.get("bits_per_unit_standard_error", record.get("standard_error", 0.0))


def level_curve(axes: Any, edges: np.ndarray, nats: np.ndarray, level: str = "masking rate") -> Any:
    """Mean cross-entropy of a corrupted token by noise level (``Likelihood.levels``).

    ``level`` is "masking rate" or "replacement rate".
    """
    edges, tokens = np.asarray(edges), {"masking rate": "masked token"}.get(level, "token")
    axes.plot((edges[1:] + edges[:-1]) / 2, np.asarray(nats) / np.log(2), marker="o", **_first(4))
    axes.set(xlim=(0, 1))
    axes.set_ylim(bottom=0)
    return dress(
        axes,
        f"Held-out cross-entropy by {level}",
        f"{level} (means of equal ranges)",
        f"bits per {tokens}",
    )


def noise_shares(axes: Any, records: Sequence[Mapping[str, Any]]) -> Any:
    """A, B, C as shares of the gradient's variance, with standard errors, from records "panel"."""
    for number, (part, label) in enumerate(PARTS):
        points = [
            (r["step"], r[f"share_{part}"], r.get(f"share_{part}_standard_error", math.nan))
            for r in records
            if f"share_{part}" in r
        ]
        steps, share, error = (np.array(column) for column in zip(*points))
        share, error, style = 100 * share, 100 * error, line(number)
        axes.plot(steps, share, label=label, **style)
        axes.fill_between(
            steps, share - error, share + error, color=style["color"], alpha=0.2, linewidth=0
        )
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    return dress(
        axes,
        "Variance of a row's gradient by source",
        "step",
        "share of the variance, %",
        columns=3,
    )


def critical_batch(axes: Any, records: Sequence[Mapping[str, Any]], batch_size: int) -> Any:
    """The critical batch size and the run's own, rows, from records "panel".

    Bars reach over two standard errors, and without end where there is no upper one.
    """
    known = [r for r in records if "critical_batch_rows_low" in r]
    steps, low = (np.array([r[n] for r in known]) for n in ("step", "critical_batch_rows_low"))
    value, high = (
        np.array([r.get(f"critical_batch_rows{end}", math.nan) for r in known])
        for end in ("", "_high")
    )
    top = 3 * np.nanmax(np.concatenate([low, high, [batch_size]]))
    axes.vlines(steps, low, np.where(np.isfinite(high), high, top), color=PALETTE[0], alpha=0.35)
    axes.plot(*(steps, value, "o"), ms=3, color=PALETTE[0], label="noise scale ± 2 standard errors")
    axes.axhline(batch_size, label=f"batch size of this run: {batch_size}", **line(3))
    axes.set(yscale="log", ylim=(None, top))
    return dress(axes, "Critical batch size", "step", "rows")


def weights(axes: Any, records: Sequence[Mapping[str, Any]]) -> Any:
    """Effective sample size of the importance weights, share of the draws, from "panel"."""
    known = [r for r in records if "effective_sample_size" in r]
    size = [100 * r["effective_sample_size"] for r in known]
    axes.plot([r["step"] for r in known], size, **_first())
    axes.set(ylim=(0, 105))
    return dress(
        axes, "Effective sample size of the importance weights", "step", "share of the draws, %"
    )


def speed(axes: Any, records: Sequence[Mapping[str, Any]]) -> Any:
    """Tokens per second, from records "speed"."""
    axes.plot([r["step"] for r in records], [r["tokens_per_second"] for r in records], **_first())
    axes.set_ylim(bottom=0)
    return dress(axes, "Speed of training", "step", "tokens per second")


def _first(markersize: float = 0) -> dict[str, Any]:
    return line(0) | {"markersize": markersize}
