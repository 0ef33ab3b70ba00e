"""Tables over seeds: means, spreads, and each method against a baseline seed by seed."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from mdm_jax.evaluation.paired import holm, paired_seeds


def summarise_seeds(
    scores: Mapping[str, Mapping[int, float]],
    baseline: str,
    higher_is_better: bool = False,
    corrected: Collection[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Every method's scores by seed, compared with the baseline's on the seeds that both have.

    JSON values by method: ``scores``, ``mean``, ``standard_deviation``, ``worst``,
    ``worst_beats_best_of_baseline`` and ``against_baseline`` (:class:`PairedSeeds`, with Holm's
    p-value ``holm_p`` over the comparisons named in ``corrected``, by default all); None where
    there is nothing to tell.
    """
    base = scores.get(baseline, {})
    worst, best = (min, max) if higher_is_better else (max, min)
    results = {}
    for method, own in scores.items():
        values = np.array(list(own.values()), np.float64)
        both = [seed for seed in own if seed in base]
        paired = beats = None
        if both and method != baseline:
            paired = paired_seeds([own[s] for s in both], [base[s] for s in both]).to_dict()
            paired["holm_p"] = None
            ends = worst(values), best(base.values())
            beats = bool(ends[0] > ends[1] if higher_is_better else ends[0] < ends[1])
        results[method] = {
            "scores": {str(seed): score for seed, score in own.items()},
            "mean": float(values.mean()) if len(values) else None,
            "standard_deviation": float(values.std(ddof=1)) if len(values) > 1 else None,
            "worst": float(worst(values)) if len(values) else None,
            "worst_beats_best_of_baseline": beats,
            "against_baseline": paired,
        }
    compared = results if corrected is None else corrected
    pairs = [results[name]["against_baseline"] for name in compared if name in results]
    known = [paired for paired in pairs if paired and paired["student_p"] is not None]
    for paired, p in zip(known, holm([paired["student_p"] for paired in known])):
        paired["holm_p"] = p
    return results


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def format_spread(result: Mapping[str, Any]) -> str:
    """Mean and standard deviation over seeds; "diverged" without a score."""
    if result["mean"] is None:
        return "diverged"
    spread = result["standard_deviation"]
    return f"{result['mean']:.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def format_difference(paired: Mapping[str, Any] | None) -> str:
    """Mean difference with its bootstrap interval, Student's for 2 to 4 seeds, where the former is
    far too narrow; ** where both intervals exclude 0."""
    if paired is None:
        return ""
    low, high = paired["student" if 2 <= len(paired["differences"]) < 5 else "bootstrap"]
    mark = " **" if paired["significant"] else ""
    return f"{paired['mean']:+.4f} [{low:+.4f}, {high:+.4f}]{mark}"


def format_number(value: float | None) -> str:
    """Four digits; empty for None."""
    return "" if value is None else f"{value:.4g}"
