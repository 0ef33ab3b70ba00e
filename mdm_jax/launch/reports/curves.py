"""The curves of a run, drawn alike in ``report.html`` and as PNGs below ``plots/``."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mdm_jax import plots
from mdm_jax.launch.start.loop import levels_give_the_bound

Record = Mapping[str, Any]
SIZE = (6.4, 4.4)
"""Inches of a curve."""
_LEVELS = {
    "masked": "masking rate",
    "block": "masking rate",
    "partition": "masking rate",
    "uniform": "replacement rate",
    "cdcd": "share of the logSNR range, clean to noisy",
}


class Curve(NamedTuple):
    """A plot by name, ``draw(axes)``, and what it shows in words."""

    name: str
    draw: Callable[[Any], Any]
    caption: str


def is_exact(config: Mapping[str, Any]) -> bool:
    """Whether a run's likelihood is exact, not a bound: each token given all before it."""
    return config["process"] == "autoregressive" or (
        config["process"] == "block" and config["block"]["size"] == 1
    )


def training_curves(config: Record, records: Sequence[Record], evaluation: Record) -> list[Curve]:
    """Loss and, where a process has noise levels, held-out loss by level.

    ``config`` is the saved one, ``evaluation`` that of ``evaluation.json`` or {}.
    """
    curves, exact = [], is_exact(config)
    biased = any(r.get("biased") for r in records)
    if config.get("alignment", {}).get("method"):
        curves += _outcomes(records)
    elif any(r["kind"] == "train" for r in records):
        unit, known = evaluation.get("unit", "unit"), entropies(evaluation, "valid")
        references = {f"{n} entropy (validation)": v for n, v in known.items()}
        result = None
        if "bits_per_unit" in evaluation:
            names = ("split", "step", "bits_per_unit", "standard_error_bits_per_unit")
            result = plots.Result(*(evaluation.get(name) for name in names))

        def draw(axes: Any) -> Any:
            return plots.training_curve(
                axes,
                records,
                unit,
                references,
                result=result,
                exact=exact,
                biased=biased,
                biased_levels=biased and not levels_give_the_bound(config),
            )

        curves.append(Curve("training", draw, _about(records, config, result, references, biased)))
    if level := _level_axis(config, evaluation):
        edges, nats = _levels(evaluation)
        curves.append(
            Curve(
                "levels",
                lambda axes: plots.level_curve(axes, edges, nats, level),
                f"Cross-entropy on the {evaluation.get('split', 'held-out')} split by {level}, a "
                "mean over each of equal ranges. For masked tokens the mean over all rates is the "
                "bound.",
            )
        )
    return curves


def level_lines(config: Record, evaluation: Record) -> list[str]:
    """The held-out cross-entropy by level in words and bits, for the terminal; [] without levels.

    Of masked tokens as ``weighting.entropy_rise.bits`` takes it.
    """
    level = _level_axis(config, evaluation)
    if not level:
        return []
    _, nats = _levels(evaluation)
    bits = ",".join("unknown" if np.isnan(n) else f"{n:.3f}" for n in nats / np.log(2))
    token = "masked token" if level == "masking rate" else "token"
    return [f"  bits of a {token} by {level}, means of {nats.size} equal ranges:", f"  ({bits})"]


def _level_axis(config: Record, evaluation: Record) -> str:
    """What the levels of an evaluation are; "" where it has none."""
    known = "levels" in evaluation and not is_exact(config)
    return _LEVELS.get(config["process"], "") if known else ""


def _levels(evaluation: Record) -> tuple[np.ndarray, np.ndarray]:
    """Edges [K + 1] and nats per corrupted token [K]."""
    levels = evaluation["levels"]
    names = ("masking_rate_edges", "nats_per_masked_token")
    return tuple(np.array(levels[name], np.float64) for name in names)


_OUTCOMES = {
    "reward": ("Reward of the model's answers", "mean reward", ("reward", "reward")),
    "preference_accuracy": ("Pairs whose chosen answer is preferred", "share of pairs", None),
    "preference_loss": ("Loss of the pairs", "loss per pair", ("train", "loss")),
}
"""Figures of held-out data of runs on preferences and rewards: title, quantity, and the (kind,
name) of the same in training."""


def _outcomes(records: Sequence[Record]) -> list[Curve]:
    """Curves of a run on preferences or rewards."""
    curves = []
    for name, (title, quantity, source) in _OUTCOMES.items():
        held_out = [
            (r["step"], r[name], r[f"{name}_standard_error"])
            for r in records
            if r["kind"] == "evaluate" and name in r
        ]
        kind, own = source or ("", "")
        training = [(r["step"], r[own]) for r in records if r["kind"] == kind]
        if not held_out and not (name == "reward" and training):
            continue
        options = {"training": training, "held_out": held_out, "title": title, "quantity": quantity}
        curves.append(
            Curve(
                name,
                functools.partial(plots.outcome_curve, **options),
                "Points: held out, with the same prompts and noise in every validation, ± the "
                "standard error over pairs or prompts. Grey: in training.",
            )
        )
    return curves


def _about(
    records: Sequence[Record],
    config: Record,
    result: plots.Result | None,
    references: Mapping[str, float],
    biased: bool,
) -> str:
    """The caption of the loss."""
    exact = is_exact(config)
    parts = ["Grey: the objective on training batches, means over the steps between two points."]
    if biased:
        parts.append("It is no bound, and not comparable to the points.")
    if any("normalised_loss" in r for r in records):
        parts.append(
            "Blue: without the noise of the levels and without weights: the running loss of each "
            "of equal ranges of the noise level, averaged evenly over the ranges, ± two standard "
            "errors. It lags by some tens of steps."
        )
    parts.append(
        "Points: validation under averaged parameters, "
        + ("exact." if exact else "the bound ± its Monte Carlo standard error.")
    )
    if result is not None:
        parts.append(f"Star: the {result.split} split, with the parameters of step {result.step}.")
    if references:
        parts.append(
            "Lines: entropies of the tokens of the validation split, alone (unigram) and each "
            "given the one before (bigram), counted on that split: somewhat below what a model "
            "of such statistics reaches."
        )
    return " ".join(parts)


def entropies(evaluation: Record, split: str) -> dict[str, float]:
    """Known token entropies of a split, bits per unit, by "unigram" and "bigram"."""
    own = "" if evaluation.get("split") == split else f"{split}_"
    found = {n: evaluation.get(f"{own}{n}_bits_per_unit") for n in ("unigram", "bigram")}
    return {name: value for name, value in found.items() if value is not None}


def noise_curves(config: Record, panel: Sequence[Record]) -> list[Curve]:
    """Where the gradient's noise comes from, from records "panel"."""
    curves = []
    if any("share_pattern" in r for r in panel):
        window = config.get("panel", {}).get("window", 0)
        curves.append(
            Curve(
                "shares",
                lambda axes: plots.noise_shares(axes, panel),
                "Shares of the variance of one row's gradient (trace of its covariance, all views "
                "of the row), from nested samples of rows, levels and masks at the parameters of "
                f"the moment, over the last {window} measurements; bands: one standard error. They "
                "are unbiased, so a small share can be estimated below zero.",
            )
        )
    if any("critical_batch_rows_low" in r for r in panel):
        size = config["train"]["batch_size"]
        curves.append(
            Curve(
                "critical_batch",
                lambda axes: plots.critical_batch(axes, panel, size),
                "Simple noise scale (McCandlish et al. 2018), rows × tr Cov(G) / |E G|²: at this "
                "batch size noise and signal are equal. From the gradients of successive steps "
                "where their signal stands out (gradients that turn make it too large, those that "
                "shrink too small), else from the measurements. Bars without a point have no upper "
                "end.",
            )
        )
    if any(r.get("effective_sample_size", 1.0) < 1 - 1e-3 for r in panel):
        curves.append(
            Curve(
                "weights",
                lambda axes: plots.weights(axes, panel),
                "Effective sample size of the importance weights, (Σw)² / (n Σw²).",
            )
        )
    return curves
