"""A recipe of Gaussian diffusion in numbers, and as text."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from mdm_jax.schedules.parameters import is_concrete
from mdm_jax.schedules.recipes import Recipe

WINDOW = (-20.0, 20.0)
"""logSNR between which losses are integrated and weights are compared."""

LEVELS = np.arange(-12.0, 12.5, 2.0)
"""logSNR of the table's rows."""

_POINTS = 4001


class RecipeSummary(NamedTuple):
    """What a recipe does at which level; see :func:`summarise`.

    Attributes:
        parts: law, weighting, output and path, as words.
        levels: [n] logSNR of the following.
        density: [n] p.
        weight: [n] W.
        importance: [n] W / p, NaN where both are zero and infinite where only p is.
        output_weight: [n] W / (p c), the factor on the network's own error.
        drawn: (low, high) logSNR between which the middle 90 % of draws fall.
        loss: (low, high) logSNR between which the middle 90 % of the loss lies.
        monotone: whether W never rises with the logSNR on its support, in the window.
        peak: logSNR of the largest W in the window.
        bound: whether W is constant there: the evidence lower bound.
        lost: (below, above) share of the loss at levels that are weighted and never drawn.
        support: (low, high) logSNR of the law.
        effective_draws: E[f]^2 / E[f^2] for f = W / p E[l]; 1 where draws follow the loss.
    """

    parts: tuple[str, str, str, str]
    levels: np.ndarray
    density: np.ndarray
    weight: np.ndarray
    importance: np.ndarray
    output_weight: np.ndarray
    drawn: tuple[float, float]
    loss: tuple[float, float]
    monotone: bool
    peak: float
    bound: bool
    lost: tuple[float, float]
    support: tuple[float, float]
    effective_draws: float


def explain(recipes: Recipe | Mapping[str, Recipe]) -> str:
    """A readable account of one recipe, or of several side by side.

    For each: where its levels lie, what it weighs them by, whether the weight is that of a bound
    with noise augmentation, and which levels it asks for and never draws; then a table of p, W,
    W / p and W / (p c) by level, c being the error of the network's output over that of eps.
    :func:`summarise` has the numbers, and says what "loss" means here.

    Args:
        recipes: one, or several by name. Their parameters must be known numbers.
    """
    if isinstance(recipes, Recipe):
        recipes = {"recipe": recipes}
    summaries = {name: summarise(recipe) for name, recipe in recipes.items()}
    paragraphs = [_paragraph(name, summary) for name, summary in summaries.items()]
    return "\n\n".join([*paragraphs, _table(summaries)])


def summarise(recipe: Recipe, levels: np.ndarray = LEVELS) -> RecipeSummary:
    """The recipe's numbers. Loss is that of N(0, 1) data under the ideal denoiser.

    There ``E[l | lambda] = sigmoid(lambda)`` per element.

    Args:
        recipe: of known parameters.
        levels: [n] logSNR to tabulate.

    Raises:
        TypeError: if a parameter of the recipe is traced.
    """
    if not is_concrete(*jax.tree.leaves(recipe)):
        raise TypeError("a recipe is summarised outside of jit, from known parameters")
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        grid = np.linspace(*WINDOW, _POINTS)
        log_weight, log_density = _curves(recipe, grid)
        low, high = (float(end) for end in recipe.law.support)
        weight_low, weight_high = (float(end) for end in recipe.weighting.support)
        drawn = tuple(float(x) for x in recipe.law.icdf(np.array([0.05, 0.95])))
        row_weight, row_density = _curves(recipe, levels)
        change = np.asarray(recipe.output.log_eps_weight(recipe.path, levels))
    carried = (grid >= weight_low) & (grid <= weight_high)
    inner = log_weight[carried]
    loss = np.exp(log_weight - np.logaddexp(0.0, -grid))
    outside = (loss * (grid < low), loss * (grid > high))
    covered = np.exp(log_density) > 0
    ratio = np.where(covered, loss**2 / np.where(covered, np.exp(log_density), 1.0), 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        importance = np.exp(row_weight) / np.exp(row_density)
    return RecipeSummary(
        parts=tuple(
            _words(part) for part in (recipe.law, recipe.weighting, recipe.output, recipe.path)
        ),
        levels=levels,
        density=np.exp(row_density),
        weight=np.exp(row_weight),
        importance=importance,
        output_weight=importance * np.exp(-change),
        drawn=drawn,
        loss=_middle(grid, loss),
        monotone=bool(np.all(np.diff(inner) <= 1e-9)),
        peak=float(grid[carried][np.argmax(inner)]),
        bound=bool(np.ptp(inner) < 1e-9),
        lost=tuple(float(part.sum() / loss.sum()) for part in outside),
        support=(low, high),
        effective_draws=float(
            np.square(np.where(covered, loss, 0.0).sum()) * (grid[1] - grid[0]) / ratio.sum()
        ),
    )


def _paragraph(name: str, summary: RecipeSummary) -> str:
    law, weighting, output, path = summary.parts
    if summary.bound:
        kind = "constant: the evidence lower bound"
    elif summary.monotone:
        kind = "never rises with logSNR: a bound with noise augmentation"
    else:
        kind = f"not monotone, largest at {summary.peak:.2f}: no bound"
    below, above = summary.lost
    low, high = summary.support
    lost = []
    if below > 0:
        lost.append(f"{below:.2%} of the loss lies below {low:.4g} and is never drawn")
    if above > 0:
        lost.append(f"{above:.2%} of the loss lies above {high:.4g} and is never drawn")
    return "\n".join(
        [
            name,
            f"  law p           {law}; 90 % of draws in [{_range(summary.drawn)}]",
            f"  weighting W     {weighting}; {kind}",
            f"  output, path    {output}, {path}",
            f"  loss            90 % in [{_range(summary.loss)}]; one draw is worth "
            f"{summary.effective_draws:.3f} of a draw from p ~ W E[l]",
            f"  support lost    {'; '.join(lost) or 'none'}",
        ]
    )


def _table(summaries: Mapping[str, RecipeSummary]) -> str:
    columns = ("p", "W", "W/p", "W/(p c)")
    width = 11 * len(columns)
    lines = [" " * 8 + "".join(f"  {name:^{width - 2}.{width - 2}}" for name in summaries)]
    lines.append(f"{'logSNR':>8}" + "".join(f"{c:>11}" for c in columns) * len(summaries))
    for row, level in enumerate(next(iter(summaries.values())).levels):
        cells = [
            value[row]
            for s in summaries.values()
            for value in (s.density, s.weight, s.importance, s.output_weight)
        ]
        lines.append(f"{level:8.1f}" + "".join(_cell(c) for c in cells))
    return "\n".join(lines)


def _curves(recipe: Recipe, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    weight, density = recipe.weighting.log_weight(levels), recipe.law.log_pdf(levels)
    return np.asarray(weight), np.asarray(density)


def _middle(grid: np.ndarray, mass: np.ndarray) -> tuple[float, float]:
    below = np.cumsum(mass) / mass.sum()
    return tuple(float(x) for x in grid[np.searchsorted(below, (0.05, 0.95))])


def _words(part: object) -> str:
    """A law, weighting, output or path as its name and what is in it."""
    if isinstance(part, tuple):
        return ", ".join(_words(member) for member in part)
    if not dataclasses.is_dataclass(part):
        return f"{float(part) + 0.0:.4g}" if np.ndim(part) == 0 else f"array{np.shape(part)}"
    inside = [_words(getattr(part, field.name)) for field in dataclasses.fields(part)]
    name = getattr(part, "name", type(part).__name__)
    return f"{name}({', '.join(filter(None, inside))})" if inside else name


def _range(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.1f}, {ends[1]:.1f}"


def _cell(value: float) -> str:
    return f"{'-':>11}" if np.isnan(value) else f"{value:11.3g}"
