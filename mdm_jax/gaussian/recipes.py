"""Recipes of Gaussian diffusion (law, weighting, output and path) of published models."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from mdm_jax.checks import Logsnr, checked, is_concrete, unknown_name
from mdm_jax.gaussian import parameterisations, paths, schedules, weightings
from mdm_jax.gaussian.parameterisations import DataStd, Output
from mdm_jax.gaussian.paths import Path
from mdm_jax.gaussian.schedules.laws import Mean, Std
from mdm_jax.gaussian.weightings import Weighting
from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules.laws import Law, logistic, uniform
from mdm_jax.types import Array, ArrayLike


@pytree_dataclass
class Recipe:
    """A Gaussian diffusion loss: law p of the levels, effective weight W, output, path of inputs.

    Frozen; ``dataclasses.replace`` changes one part. W does not change when the law is replaced.
    """

    law: Law
    weighting: Weighting
    output: Output
    path: Path

    def log_importance_weight(self, logsnr: ArrayLike) -> Array:
        """``log(W / p)``, the factor of the eps error at a level drawn from the law."""
        return self.weighting.log_weight(logsnr) - self.law.log_pdf(logsnr)


def ddpm() -> Recipe:
    """Ho et al. 2020: linear betas, eps, unit weight."""
    return _unit_weight(schedules.ddpm_linear(), parameterisations.eps(), paths.vp())


def iddpm() -> Recipe:
    """Nichol and Dhariwal 2021 (their simple loss): cosine law, eps, unit weight."""
    return _unit_weight(schedules.cosine(), parameterisations.eps(), paths.vp())


@checked
def vdm(low: Logsnr = -5.0, high: Logsnr = 13.3) -> Recipe:
    """Kingma et al. 2021: the bound, eps, logSNR uniform between two levels."""
    return Recipe(uniform(low, high), weightings.elbo(), parameterisations.eps(), paths.vp())


def v_prediction() -> Recipe:
    """Salimans and Ho 2022: cosine law, v, unit weight. The objective of :func:`flow`, scaled."""
    return _unit_weight(schedules.cosine(), parameterisations.v(), paths.vp())


@checked
def edm(mean: Mean = -1.2, std: Std = 1.2, sigma_data: DataStd = 0.5) -> Recipe:
    """Karras et al. 2022: log sigma ~ N(mean, std^2), preconditioned output F, unit weight."""
    law = schedules.lognormal(mean, std)
    return _unit_weight(law, parameterisations.edm(sigma_data), paths.ve())


@checked
def edm2(mean: Mean = -0.4, std: Std = 1.0, sigma_data: DataStd = 0.5) -> Recipe:
    """Karras et al. 2024 without the learned weight: :func:`edm` with another law."""
    return edm(mean, std, sigma_data)


def flow() -> Recipe:
    """Liu et al. 2023, Lipman et al. 2023: uniform flow time, flow velocity, unit weight."""
    return _unit_weight(logistic(0.0, 2.0), parameterisations.flow(), paths.flow())


@checked
def sd3(mean: Mean = 0.0, std: Std = 1.0) -> Recipe:
    """Esser et al. 2024: :func:`flow` with logit(flow time) ~ N(mean, std^2)."""
    return _unit_weight(schedules.lognormal(mean, std), parameterisations.flow(), paths.flow())


def indi() -> Recipe:
    """Delbracio and Milanfar 2023 (InDI): uniform flow time, the clean data, unit weight."""
    return _unit_weight(schedules.indi(), parameterisations.x0(), paths.flow())


RECIPES: dict[str, Callable[..., Recipe]] = {
    make.__name__: make for make in (ddpm, iddpm, vdm, v_prediction, edm, edm2, flow, sd3, indi)
}


def by_name(name: str, **parameters: ArrayLike) -> Recipe:
    """The recipe of that name; ValueError for an unknown one, with close matches."""
    if name not in RECIPES:
        raise unknown_name(name, RECIPES, "recipe")
    return RECIPES[name](**parameters)


def _unit_weight(law: Law, output: Output, path: Path) -> Recipe:
    return Recipe(law, weightings.from_recipe(law, output, path), output, path)


WINDOW = (-20.0, 20.0)
"""logSNR between which losses are integrated and weights are compared."""

LEVELS = np.arange(-12.0, 12.5, 2.0)


class RecipeSummary(NamedTuple):
    """A recipe in numbers; all levels are logSNR. See :func:`summarise`.

    Attributes:
        parts: law, weighting, output and path, as words.
        levels, density, weight: [n] levels, with p and W there.
        importance: [n] W / p, NaN where both are zero and infinite where only p is.
        output_weight: [n] W / (p c), the factor on the error of the network's own output.
        drawn, loss: (low, high) of the middle 90 % of draws, and of the loss.
        monotone: whether W never rises with the logSNR on its support, in the window.
        peak: level of the largest W in the window.
        bound: whether W is constant there: the evidence lower bound.
        lost: (below, above) share of the loss at weighted levels that are never drawn.
        support: (low, high) of the law.
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
    """Compare recipes as text: a paragraph each, and a table of p, W, W / p and W / (p c) by level.

    c is the output's squared error over that of eps. Terms and limits as in :func:`summarise`.
    """
    if isinstance(recipes, Recipe):
        recipes = {"recipe": recipes}
    summaries = {name: summarise(recipe) for name, recipe in recipes.items()}
    paragraphs = [_paragraph(name, summary) for name, summary in summaries.items()]
    return "\n\n".join([*paragraphs, _table(summaries)])


def summarise(recipe: Recipe, levels: np.ndarray = LEVELS) -> RecipeSummary:
    """Where a recipe draws, weighs and loses at ``levels`` [n]; TypeError if it is traced.

    The loss is that of N(0, 1) data and the ideal denoiser, ``sigmoid(lambda)`` per element.
    """
    if not is_concrete(*jax.tree.leaves(recipe)):
        raise TypeError("a recipe is summarised outside of jit, from known parameters")
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        grid = np.linspace(*WINDOW, 4001)
        log_weight, log_density = _curves(recipe, grid)
        low, high = (float(end) for end in recipe.law.support)
        weight_low, weight_high = (float(end) for end in recipe.weighting.support)
        drawn = tuple(float(x) for x in recipe.law.icdf(np.array([0.05, 0.95])))
        weight, density = (np.exp(curve) for curve in _curves(recipe, levels))
        change = np.asarray(recipe.output.log_eps_weight(recipe.path, levels))
    carried = (grid >= weight_low) & (grid <= weight_high)
    inner = log_weight[carried]
    loss = np.exp(log_weight - np.logaddexp(0.0, -grid))
    covered = np.exp(log_density) > 0
    squares = np.where(covered, loss**2 / np.where(covered, np.exp(log_density), 1.0), 0.0)
    total = np.where(covered, loss, 0.0).sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        importance = weight / density
    return RecipeSummary(
        parts=tuple(_words(getattr(recipe, f.name)) for f in dataclasses.fields(recipe)),
        levels=levels,
        density=density,
        weight=weight,
        importance=importance,
        output_weight=importance * np.exp(-change),
        drawn=drawn,
        loss=_middle(grid, loss),
        monotone=bool(np.all(np.diff(inner) <= 1e-9)),
        peak=float(grid[carried][np.argmax(inner)]),
        bound=bool(np.ptp(inner) < 1e-9),
        lost=tuple(float(loss[out].sum() / loss.sum()) for out in (grid < low, grid > high)),
        support=(low, high),
        effective_draws=float(total**2 * (grid[1] - grid[0]) / squares.sum()),
    )


def _paragraph(name: str, summary: RecipeSummary) -> str:
    law, weighting, output, path = summary.parts
    if summary.bound:
        kind = "constant: the evidence lower bound"
    elif summary.monotone:
        kind = "never rises with logSNR: a bound with noise augmentation"
    else:
        kind = f"not monotone, largest at {summary.peak:.2f}: no bound"
    lost = [
        f"{share:.2%} of the loss lies {side} {end:.4g} and is never drawn"
        for share, side, end in zip(summary.lost, ("below", "above"), summary.support)
        if share > 0
    ]
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
            f"{'-':>11}" if np.isnan(column[row]) else f"{column[row]:11.3g}"
            for s in summaries.values()
            for column in (s.density, s.weight, s.importance, s.output_weight)
        ]
        lines.append(f"{level:8.1f}" + "".join(cells))
    return "\n".join(lines)


def _curves(recipe: Recipe, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    weight, density = recipe.weighting.log_weight(levels), recipe.law.log_pdf(levels)
    return np.asarray(weight), np.asarray(density)


def _middle(grid: np.ndarray, mass: np.ndarray) -> tuple[float, float]:
    below = np.cumsum(mass) / mass.sum()
    return tuple(float(x) for x in grid[np.searchsorted(below, (0.05, 0.95))])


def _words(part: object) -> str:
    if isinstance(part, tuple):
        return ", ".join(_words(member) for member in part)
    if not dataclasses.is_dataclass(part):
        return f"{float(part) + 0.0:.4g}" if np.ndim(part) == 0 else f"array{np.shape(part)}"
    inside = [_words(getattr(part, field.name)) for field in dataclasses.fields(part)]
    name = getattr(part, "name", type(part).__name__)
    return f"{name}({', '.join(filter(None, inside))})" if inside else name


def _range(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.1f}, {ends[1]:.1f}"
