"""Plots draw what they are given."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from mdm_jax import plots, schedules
from mdm_jax.gaussian import schedules as gaussian_schedules

LAWS = {"flow": gaussian_schedules.flow(), "uniform": schedules.uniform(-4.0, 4.0)}


@pytest.fixture
def axes():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def lines(axes):
    return {line.get_label(): line.get_xydata() for line in axes.lines}


def test_schedules_in_logsnr_and_in_sigma(axes):
    found = lines(plots.schedule_curves(axes, LAWS, points=9))
    time = found["flow"][:, 0]
    np.testing.assert_allclose(found["flow"][:, 1], 2 * np.log((1 - time) / time), atol=1e-5)
    np.testing.assert_allclose(found["uniform"][:, 1], 4 - 8 * time, atol=1e-5)


def test_noise_over_signal_is_the_odds_of_flow_time(axes):
    found = lines(plots.noise_curves(axes, LAWS, points=9))["flow"]
    np.testing.assert_allclose(found[:, 1], found[:, 0] / (1 - found[:, 0]), rtol=1e-5)


def test_densities_have_their_mass(axes):
    for curve in lines(plots.law_densities(axes, LAWS, low=-30, high=30)).values():
        assert np.trapezoid(curve[:, 1], curve[:, 0]) == pytest.approx(1, abs=0.02)


def test_trajectories_end_one_step_beyond_the_last_finite_level(axes):
    levels, states = np.array([-2.0, 0.0, 2.0, np.inf]), np.arange(8.0).reshape(4, 2)
    drawn = plots.trajectories(axes, levels, states).lines
    np.testing.assert_array_equal(drawn[1].get_xydata(), [[-2, 1], [0, 3], [2, 5], [4, 7]])
    with pytest.raises(ValueError, match="4 levels need as many states, got 3"):
        plots.trajectories(axes, levels, states[:3])


def test_the_readable_loss_is_drawn_in_the_unit_of_the_axes(axes):
    """Two units per token: 2 bits per token are 1 bit per unit, for both losses."""
    bits = np.log(2)
    records = [
        {"step": 1, "kind": "train", "loss": 2 * bits, "bits_per_unit": 1.0},
        {"step": 1, "kind": "monitor", "normalised_loss": 3 * bits},
        {"step": 1, "kind": "evaluate", "bits_per_unit": 1.2, "standard_error": 0.1},
    ]
    found = lines(plots.training_curve(axes, records, "character"))
    np.testing.assert_allclose(found["training, even over levels (± 2 s.e.)"], [[1, 1.5]])
    np.testing.assert_allclose(found["training, single batches"], [[1, 1.0]])


def test_panels_of_weightings_and_their_film(tmp_path):
    image = pytest.importorskip("PIL.Image")
    levels = np.linspace(-1, 1, 5)
    curves = {"static": (np.ones(5), np.ones(5)), "warp": (levels + 1, 2 * levels + 2)}

    def panels(when):
        figure = plots.new_figure((4, 2))
        return plots.weighting_panels(figure, levels, curves, "logSNR", (3, 5), when)

    left, right = panels(", step 3").axes
    assert (left.get_title("left"), left.get_ylim()) == ("Levels that are drawn, step 3", (0, 3))
    assert right.get_ylim() == (0, 5)
    np.testing.assert_array_equal(lines(left)["warp"][:, 1], levels + 1)
    np.testing.assert_array_equal(right.lines[1].get_ydata(), 2 * levels + 2)
    path = tmp_path / "deep" / "film.gif"
    plots.write_film((panels(f", step {n}") for n in (0, 10, 20)), path)
    with image.open(path) as film:
        assert (film.format, film.n_frames) == ("GIF", 3)
        assert film.size == (400, 200)
        film.seek(2)
        assert film.info["duration"] == 2500
