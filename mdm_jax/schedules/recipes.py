"""Recipes of Gaussian diffusion: the losses of the literature differ in these four and no more.

A :class:`Recipe` names the law that levels are drawn from, the effective weight that is minimised,
what the network outputs and the path of its input. The presets below are published models in these
terms; ``schedules.explain`` puts any number of them side by side.
"""

import difflib
from collections.abc import Callable

from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules import gaussian, parameterisations, paths, weightings
from mdm_jax.schedules.laws import Law, logistic, uniform
from mdm_jax.schedules.parameterisations import Output
from mdm_jax.schedules.paths import Path
from mdm_jax.schedules.weighting_curves import Weighting
from mdm_jax.typing import Array, ArrayLike


@pytree_dataclass
class Recipe:
    """A Gaussian diffusion loss. Frozen; ``dataclasses.replace`` changes one part.

    Attributes:
        law: p, what training levels are drawn from.
        weighting: W, the effective weight; see :mod:`~mdm_jax.schedules.weightings`. It does not
            change when the law is replaced.
        output: what the network predicts.
        path: of the noisy input.
    """

    law: Law
    weighting: Weighting
    output: Output
    path: Path

    def log_importance_weight(self, logsnr: ArrayLike) -> Array:
        """``log(W / p)``, the factor of the eps error of a level drawn from the law."""
        return self.weighting.log_weight(logsnr) - self.law.log_pdf(logsnr)

    def log_output_weight(self, logsnr: ArrayLike) -> Array:
        """``log(W / (p c))``, the factor of the squared error of the network's own output."""
        change = self.output.log_eps_weight(self.path, logsnr)
        return self.log_importance_weight(logsnr) - change


def ddpm() -> Recipe:
    """Ho et al. 2020: linear betas, eps, unit weight."""
    return _unit_weight(gaussian.ddpm_linear(), parameterisations.eps(), paths.vp())


def iddpm() -> Recipe:
    """Nichol and Dhariwal 2021 (their simple loss): cosine law, eps, unit weight."""
    return _unit_weight(gaussian.cosine(), parameterisations.eps(), paths.vp())


def vdm(low: ArrayLike = -5.0, high: ArrayLike = 13.3) -> Recipe:
    """Kingma et al. 2021: the bound, eps, logSNR uniform between fixed ends.

    Args:
        low: noisiest logSNR.
        high: cleanest logSNR.
    """
    law = uniform(low, high)
    return Recipe(law, weightings.elbo(), parameterisations.eps(), paths.vp())


def v_prediction() -> Recipe:
    """Salimans and Ho 2022: cosine law, v, unit weight. The objective of :func:`flow`, scaled."""
    return _unit_weight(gaussian.cosine(), parameterisations.v(), paths.vp())


def edm(mean: ArrayLike = -1.2, std: ArrayLike = 1.2, sigma_data: ArrayLike = 0.5) -> Recipe:
    """Karras et al. 2022: log sigma normal, preconditioned output F, unit weight.

    Args:
        mean: of log sigma.
        std: of log sigma.
        sigma_data: standard deviation of the data.
    """
    law = gaussian.lognormal(mean, std)
    return _unit_weight(law, parameterisations.edm(sigma_data), paths.ve())


def edm2(mean: ArrayLike = -0.4, std: ArrayLike = 1.0, sigma_data: ArrayLike = 0.5) -> Recipe:
    """Karras et al. 2024 without the learned weight: :func:`edm` with another law."""
    return edm(mean, std, sigma_data)


def flow() -> Recipe:
    """Liu et al. 2023, Lipman et al. 2023: uniform flow time, flow velocity, unit weight."""
    return _unit_weight(logistic(0.0, 2.0), parameterisations.flow(), paths.flow())


def sd3(mean: ArrayLike = 0.0, std: ArrayLike = 1.0) -> Recipe:
    """Esser et al. 2024: :func:`flow` with logit-normal flow times.

    Args:
        mean: of the logit of the flow time, positive is noisier.
        std: of the logit of the flow time.
    """
    return _unit_weight(gaussian.lognormal(mean, std), parameterisations.flow(), paths.flow())


RECIPES: dict[str, Callable[..., Recipe]] = {
    "ddpm": ddpm,
    "iddpm": iddpm,
    "vdm": vdm,
    "v_prediction": v_prediction,
    "edm": edm,
    "edm2": edm2,
    "flow": flow,
    "sd3": sd3,
}
"""Name -> factory, for configurations."""


def by_name(name: str, **parameters: ArrayLike) -> Recipe:
    """The recipe of that name; ``parameters`` are those of its factory.

    Raises:
        ValueError: for an unknown name, with the nearest known ones.
        TypeError: for a parameter the factory does not have.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown recipe {name!r}; {hint}known: {', '.join(sorted(RECIPES))}")
    return RECIPES[name](**parameters)


def _unit_weight(law: Law, output: Output, path: Path) -> Recipe:
    return Recipe(law, weightings.from_recipe(law, output, path), output, path)
