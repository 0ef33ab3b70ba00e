"""Plots of the variance meter: every method has a row that can be read."""

import dataclasses

import numpy as np
import pytest
from matplotlib.figure import Figure

from mdm_jax import plots
from mdm_jax.meter.efficiency import Efficiency


def _measured(value, unsettled=""):
    groups = np.array([value - 0.5, value + 0.5])
    return Efficiency(groups, 1.0, 2, 4, top_share=0.1, tail_index=3.0, unsettled=unsettled)


@pytest.mark.parametrize("first", ["", "groups disagree"])
def test_methods_that_have_not_settled_keep_their_place(first):
    axes = Figure().add_subplot()
    results = {"a": _measured(2.0, first), "b": _measured(3.0)}
    plots.efficiency_bars(axes, results)
    low, high = sorted(axes.get_ylim())
    assert low <= -0.5 and high >= 1.5 and axes.yaxis_inverted()  # "a" on top, nothing cut off
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b"]
    assert [t.get_text().strip() for t in axes.texts] == (["not settled"] if first else [])
    assert axes.patches[-1].get_width() == pytest.approx(6.0)  # variance times two passes


def test_colours_of_efficiency_tell_numbers_of_passes_apart():
    axes = Figure().add_subplot()
    two, one = _measured(2.0), dataclasses.replace(_measured(5.0), passes=1)
    plots.efficiency_bars(axes, {"a": two, "b": one, "c": two})
    handles, labels = axes.get_legend_handles_labels()
    assert sorted(labels) == ["1 forward pass per row", "2 forward passes per row"]
    colours = [patch.get_facecolor() for patch in axes.patches]
    assert colours[0] == colours[2] != colours[1]
    hatches = [patch.get_hatch() for patch in axes.patches]
    assert hatches[0] == hatches[2] != hatches[1]
