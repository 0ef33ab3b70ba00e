"""Plots of text quality against the number of sampling steps."""

from collections.abc import Mapping, Sequence
from typing import Any

from mdm_jax.plots.runs import new_figure

PANELS = (
    ("generative_perplexity", "generative perplexity"),
    ("token_entropy", "token entropy (nats)"),
)
"""Keys of ``TextQuality.to_dict`` that :func:`quality_by_steps` draws, and their labels."""

_X = {"num_steps": "steps", "forward_passes": "forward passes per text"}


def quality_curve(
    axes: Any,
    records: Sequence[Mapping[str, Any]],
    metric: str,
    label: str | None = None,
    *,
    against: str = "num_steps",
    reference: float | None = None,
) -> Any:
    """One metric of each sampler against its number of steps, on a base-2 logarithmic axis.

    Args:
        axes: matplotlib axes.
        records: ``{"sampler": name, "num_steps": int, "forward_passes": float, "quality": dict}``
            with the dict of ``TextQuality.to_dict``, in any order; those without the metric are
            left out. Error bars are drawn from ``<metric>_standard_error``.
        metric: key of the dict.
        label: of the vertical axis; the metric if not given.
        against: "num_steps" or "forward_passes".
        reference: horizontal line, the metric of held-out text.

    Raises:
        ValueError: for another ``against``, or one that is not positive.
    """
    if against not in _X:
        raise ValueError(f"against must be one of {', '.join(_X)}, got {against!r}")
    for number, sampler in enumerate(dict.fromkeys(r["sampler"] for r in records)):
        points = sorted(
            (r[against], r["quality"][metric], r["quality"].get(f"{metric}_standard_error") or 0.0)
            for r in records
            if r["sampler"] == sampler and r["quality"].get(metric) is not None
        )
        if points:
            x, y, error = zip(*points)
            if x[0] <= 0:
                raise ValueError(f"{sampler}: {against} must be positive, got {x[0]}")
            style = {"color": f"C{number % 10}", "marker": "o", "ms": 3, "capsize": 2}
            axes.errorbar(x, y, yerr=error, label=sampler, **style)
    if reference is not None:
        axes.axhline(reference, color="0.4", linestyle="--", linewidth=1, label="held-out text")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel=_X[against], ylabel=label or metric)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small")
    return axes


def quality_by_steps(
    records: Sequence[Mapping[str, Any]],
    *,
    against: str = "num_steps",
    references: Mapping[str, float] | None = None,
    size: tuple[float, float] = (10, 4),
) -> Any:
    """A figure of ``size`` inches: generative perplexity and token entropy by sampler.

    ``records`` and ``against`` as for :func:`quality_curve`; ``references`` is the
    ``TextQuality.to_dict()`` of held-out text.
    """
    figure = new_figure(size)
    for axes, (name, label) in zip(figure.subplots(1, len(PANELS)), PANELS):
        reference = (references or {}).get(name)
        quality_curve(axes, records, name, label, against=against, reference=reference)
    return figure
