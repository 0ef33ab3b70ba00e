"""The settings of ``variance.order=auto``."""

import dataclasses
from typing import Annotated

from mdm_jax.checks import Real, Whole, checked


@checked
@dataclasses.dataclass(frozen=True)
class AutoSettings:
    """How ``variance.order=auto`` measures the chains that it chooses from."""

    budget: Annotated[
        float, Real("[0, 1]", "of the run's forward-backward passes", "for all measurements")
    ] = 0.02
    every: Annotated[
        int, Whole("[0, 2e9]", "steps", "between measurements; 0: only before the first step")
    ] = 0
    passes: Annotated[
        int, Whole("[2, 1e6]", "forward passes", "of a measured batch: its rows times their views")
    ] = 8
    groups: Annotated[int, Whole("[4, 1e6]", "", "of redraws, for the intervals")] = 8
    warm_up: Annotated[
        int, Whole("[0, 1e6]", "batches", "that an adaptive transform learns from first")
    ] = 64


@checked
@dataclasses.dataclass(frozen=True)
class FitSettings:
    """The grid of ``mdm variance --fit``; by default the published calibration of P-POTS."""

    levels: Annotated[int, Whole("[3, 1e6]", "", "masking rates of the grid, evenly spaced")] = 69
    rows: Annotated[int, Whole("[2, 1e6]", "rows", "of the data, at every rate")] = 10
    masks: Annotated[int, Whole("[2, 1e6]", "", "of a row at a rate")] = 10
