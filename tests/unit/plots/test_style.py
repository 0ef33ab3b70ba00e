"""The style of all plots: told apart without colour, labelled, and no legend over the data."""

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from mdm_jax import plots
from mdm_jax.launch.reports import curves

RECORDS = [
    {"step": step, "kind": kind, **values}
    for step in (10, 20, 30)
    for kind, values in (
        ("train", {"loss": 2.0 / step, "bits_per_unit": 4.0 / step}),
        ("monitor", {"normalised_loss": 1.0 / step, "normalised_loss_standard_error": 0.01}),
        (
            "evaluate",
            {"loss": 0.1, "bits_per_unit": 3.0 / step, "bits_per_unit_standard_error": 0.2},
        ),
    )
]
EVALUATION = {
    "split": "test",
    "step": 20,
    "unit": "character",
    "bits_per_unit": 0.25,
    "standard_error_bits_per_unit": 0.03,
    "unigram_bits_per_unit": 4.0,
    "bigram_bits_per_unit": 3.0,
    "valid_unigram_bits_per_unit": 4.5,
    "valid_bigram_bits_per_unit": None,
    "levels": {"masking_rate_edges": [0.0, 0.5, 1.0], "nats_per_masked_token": [1.0, None]},
}
PANEL = [
    {"step": step, "share_pattern": 0.5, "share_rate": 0.2, "share_data": 0.3}
    | {"critical_batch_rows_low": 9.0, "critical_batch_rows": 10.0, "effective_sample_size": 0.8}
    for step in (10, 20)
]


def config(process, **more):
    return {"process": process, "train": {"batch_size": 32}, **more}


def drawn(curve):
    figure = plots.new_figure(curves.SIZE)
    axes = curve.draw(figure.add_subplot())
    figure.draw_without_rendering()
    return axes


def luminance(color):
    return np.dot([0.2126, 0.7152, 0.0722], to_rgb(color))  # of grey, as printed


def test_neighbours_differ_without_colour_and_no_two_series_are_alike():
    series = [plots.line(number) for number in range(35)]
    assert len({(s["color"], str(s["linestyle"])) for s in series}) == 35
    for left, right in itertools.pairwise(series):
        assert left["linestyle"] != right["linestyle"]
    for bars in ([plots.bar(number) for number in range(5)],):
        assert len({b["hatch"] for b in bars}) == 5
    parts = [luminance(plots.bar(number)["color"]) for number in range(3)]  # A, B, C
    assert all(abs(a - b) > 0.05 for a, b in itertools.combinations(parts, 2))


def test_the_colours_are_those_of_okabe_and_ito():
    known = ["000000", "E69F00", "56B4E9", "009E73", "F0E442", "0072B2", "D55E00", "CC79A7"]
    assert {color.removeprefix("#").upper() for color in plots.PALETTE} <= {*known}


@pytest.mark.parametrize("process", ["masked", "block", "uniform", "autoregressive", "gaussian"])
def test_every_curve_has_title_and_labels_and_its_legend_off_the_data(process):
    of_run = config(process, block={"size": 4})
    found = curves.training_curves(of_run, RECORDS, EVALUATION)
    for curve in [*found, *curves.noise_curves(of_run, PANEL)]:
        axes = drawn(curve)
        assert axes.get_title("left") and axes.get_xlabel() and axes.get_ylabel() and curve.caption
        inside, legend = axes.get_window_extent(), axes.get_legend()
        if legend is not None:
            assert legend.get_window_extent().y1 < axes.xaxis.label.get_window_extent().y0
            assert legend.get_window_extent().x1 <= axes.figure.bbox.x1
        assert inside.width > 0.75 * axes.figure.bbox.width
        assert axes.get_legend_handles_labels()[1] == [] or legend is not None


def test_the_loss_has_the_validations_entropies_and_the_result_of_the_test():
    axes = drawn(curves.training_curves(config("masked"), RECORDS, EVALUATION)[0])
    found = {line.get_label(): line.get_xydata() for line in axes.lines}
    np.testing.assert_allclose(found["unigram entropy (validation)"][:, 1], 4.5)
    assert not any("bigram" in label for label in found)  # not known of the validation split
    bars = {bar.get_label(): bar for bar in axes.containers}
    assert [*bars] == ["validation (bound ± 1 s.e.)", "test (bound): 0.250"]
    points, _, (errors,) = bars["validation (bound ± 1 s.e.)"].lines
    np.testing.assert_allclose(points.get_xydata(), [[10, 0.3], [20, 0.15], [30, 0.1]])
    np.testing.assert_allclose(errors.get_segments()[0], [[10, 0.1], [10, 0.5]])
    star, _, (errors,) = bars["test (bound): 0.250"].lines
    np.testing.assert_allclose(star.get_xydata(), [[20, 0.25]])
    np.testing.assert_allclose(errors.get_segments()[0], [[20, 0.22], [20, 0.28]])
    assert axes.get_ylabel() == "bits per character"


@pytest.mark.parametrize("process, biased", [("cdcd", True), ("masked", True), ("masked", False)])
def test_a_training_loss_that_is_no_bound_says_so(process, biased):
    """Of masked runs under another weighting the mean over levels still is the bound."""
    records = [r | {"biased": 1.0} if biased and r["kind"] == "train" else r for r in RECORDS]
    records.append({"step": 20, "kind": "monitor", "normalised_loss": 1.0})
    of_run = config(process) | {"weighting": {}, "data": {}}
    found = curves.training_curves(of_run, records, {})[0]
    labels = drawn(found).get_legend_handles_labels()[1]
    assert ("training (no bound), single batches" in labels) == biased
    by_level = "training (no bound), even over levels (± 2 s.e.)"
    assert (by_level in labels) == (process == "cdcd")
    assert ("It is no bound" in found.caption) == biased


@pytest.mark.parametrize(
    "process, size, names",
    [
        ("autoregressive", 4, ["training"]),
        ("block", 1, ["training"]),
        ("block", 4, ["training", "levels"]),
        ("uniform", 4, ["training", "levels"]),
        ("gaussian", 4, ["training"]),
    ],
)
def test_exact_likelihoods_are_called_so_and_have_no_plot_over_rates(process, size, names):
    found = curves.training_curves(config(process, block={"size": size}), RECORDS, EVALUATION)
    assert [curve.name for curve in found] == names
    labels = drawn(found[0]).get_legend_handles_labels()[1]
    exact = process == "autoregressive" or size == 1
    assert any("exact" in label for label in labels) == exact
    assert any("bound" in label for label in labels) != exact
    assert ("bound" in found[0].caption) != exact
    if names[1:]:
        level = "replacement rate" if process == "uniform" else "masking rate"
        assert drawn(found[1]).get_xlabel().startswith(level)


def test_errors_of_runs_that_named_them_otherwise_are_drawn():
    old = {"step": 1, "kind": "evaluate", "bits_per_unit": 1.0, "standard_error": 0.5}
    axes = plots.training_curve(Figure().add_subplot(), [old], "character")
    (errors,) = axes.containers[0].lines[2]
    np.testing.assert_allclose(errors.get_segments()[0], [[1, 0.5], [1, 1.5]])
