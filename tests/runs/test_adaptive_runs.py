"""The study of adaptive mechanisms: its plan, its tables, and a run of it in small."""

import json
import re

import jax
import numpy as np
import pytest

from experiments import adaptive
from mdm_jax import variance
from mdm_jax.draws import DrawSpec, LossStats
from mdm_jax.gaussian.recipes import RECIPES
from mdm_jax.launch.gaussian_family import gaussian_recipe
from mdm_jax.launch.names import GAUSSIAN_MODIFIERS, VARIANCE


def test_mechanisms_of_a_run():
    assert adaptive.chosen("digits", ["two_rates", "ppots"]) == ["static", "ppots", "two_rates"]
    assert adaptive.chosen("text", ["two_rates", "ppots"]) == ["static", "ppots"]
    assert set(adaptive.MECHANISMS) - {"static"} <= {*VARIANCE, *GAUSSIAN_MODIFIERS}
    with pytest.raises(ValueError, match="'speed' is none of static, ema_bins"):
        adaptive.chosen("text", ["speed"])
    with pytest.raises(ValueError, match="'mnist' is none of digits, text"):
        adaptive.chosen("mnist", ["ppots"])


@pytest.mark.parametrize("run", adaptive.RUNS)
def test_runs_differ_in_the_mechanism_alone(run):
    base = adaptive.configure(run, "static", 3).to_dict()
    assert base["seed"] == 3 and base["variance"]["order"] == ("stratified",)
    assert base["train"]["steps"] // base["train"]["checkpoint_every"] == adaptive.FRAMES
    for name in adaptive.chosen(run, list(adaptive.MECHANISMS)):
        config = adaptive.configure(run, name, 3)
        config.update_from_flattened_dict(
            {path: _at(base, path) for path in getattr(adaptive.MECHANISMS[name], run)}
        )
        assert config.to_dict() == base, name


def _at(record, path):
    for part in path.split("."):
        record = record[part]
    return record


def test_fixed_laws_change_what_is_minimised_and_two_rates_is_the_law_of_speed():
    """Unit weight on the output's error: W / p is that of the recipe, times a constant."""
    levels = np.linspace(-6, 6, 13)
    recipe = gaussian_recipe(adaptive.configure("digits", "static", 0).gaussian)
    ratio = np.asarray(recipe.log_importance_weight(levels))
    for name in ("beta_time", "two_rates"):
        other = gaussian_recipe(adaptive.configure("digits", name, 0).gaussian)
        np.testing.assert_allclose(
            np.ptp(other.log_importance_weight(levels) - ratio), 0, atol=1e-4
        )
        assert np.ptp(other.law.log_pdf(levels) - recipe.law.log_pdf(levels)) > 0.5
    with pytest.raises(ValueError, match="speed: the slope of sigma must fall"):
        GAUSSIAN_MODIFIERS["speed"](RECIPES["edm"]().law)


@pytest.mark.slow
def test_cdtd_of_one_level_is_cdcd():
    """So it has no row of its own."""
    spec, draws = DrawSpec(64, 1, (1,)), []
    for warp in (variance.cdcd_warp(), variance.cdtd_warp()):

        @jax.jit
        def step(state, key, warp=warp):
            draw = variance.draw_batch(key, warp, state, spec)
            ones = jax.numpy.ones_like(draw.u)
            return warp.update(state, draw, LossStats(1 - draw.u**3, ones, ones, ones)), draw.u

        state = warp.init(spec)
        for number in range(20):
            state, u = step(state, jax.random.key(number))
        draws.append(u)
    np.testing.assert_array_equal(*draws)
    flat = variance.draw_batch(jax.random.key(19), variance.identity(), (), spec).u
    assert np.max(np.abs(draws[0] - flat)) > 1e-3


def record(bits, distance, noise=2.0, unsettled=""):
    shape = np.array([0.9, 1.1, 1.0, 1.0])
    figure = {"variances": noise * shape, "signals": np.ones(4), "unsettled": unsettled}
    return {
        "bits_per_unit": bits,
        "bits_per_unit_error": 0.0123,
        "distance": distance and {"value": distance, "standard_error": 0.01, "of_data": 0.2},
        "noise_at_shared_parameters": figure,
        "noise_at_own_parameters": figure,
    }


def test_the_table():
    records = {
        "static": [record(2.0, 0.4), record(2.2, 0.4)],
        "ppots": [record(2.0, 0.3, noise=1.0), record(2.4, 0.52, noise=1.0)],
        "cdcd_warp": [record(2.3, 0.4), record(2.3, 0.4, unsettled="too few")],
    }
    header, _, static, ppots, cdcd = adaptive.table("digits", records).splitlines()
    # Variances over seeds 0.02, 0.08 and 0; of differences 0.02 and 0.02.
    assert "| bits/dim (± 0.129, difference ± 0.100) |" in header
    assert "of training pictures) (± 0.064, difference ± 0.078)" in header
    # Noise of standard deviation 0.16 in four groups, and of two seeds.
    assert static.endswith("| 2 ± 0.06 | 2 ± 0.06 | 2.100 | 0.400 |")
    assert ppots.startswith("| ppots | less variance of the loss | running moments")
    assert "| 1 ± 0.03 (× 0.5 ± " in ppots
    assert ppots.endswith("| 1 ± 0.03 | 2.200 (+0.100) | 0.410 (+0.010) |")
    assert "| not settled | not settled | 2.300 (+0.200) |" in cdcd
    one = {name: [record(2.0, None)] for name in ("static", "ppots")}
    header = adaptive.table("text", one).splitlines()[0]
    assert header.endswith("| bits/character (one seed; Monte Carlo error 0.012) |")


def test_the_ratio_of_paired_noise():
    """The jackknife of a mean's logarithm is close to the first order of its error."""
    generator = np.random.default_rng(0)
    own = 4 + 0.1 * generator.standard_normal(400)
    figures = [
        {"variances": v, "signals": np.ones(400), "unsettled": ""} for v in (own, 2 + 0 * own)
    ]
    found = adaptive._noise(figures[:1], figures[1:])
    ratio = own.mean() / 2
    error = own.std(ddof=1) / 20 / 2  # 0.0025
    assert found.endswith(f"(× {ratio:.3g} ± {error:.1g})")


def test_weightings_are_compared_up_to_a_constant():
    levels = np.linspace(0, 2, 3)
    curves = adaptive.Curves(np.arange(2), levels, None, np.array([[1, 1, 1], [0, 4, 0]]))
    np.testing.assert_allclose(adaptive.shares(curves), [[0.5, 0.5, 0.5], [0, 1, 0]])


def runs_in(printed):
    """How many runs were begun; the rules of tables are dashes too."""
    return len(re.findall("^--- ", printed, re.MULTILINE))


@pytest.mark.slow
def test_the_study_in_small(tmp_path, capsys):
    arguments = [f"--workdir={tmp_path}", "--smoke", "--seeds=0", "--mechanisms=ema_bins,cdcd_warp"]
    assert adaptive.main(arguments) == 0
    printed = capsys.readouterr().out
    assert runs_in(printed) == 6  # two runs of three mechanisms
    records = json.loads((tmp_path / "adaptive.json").read_text())
    assert list(records) == ["digits", "text"]
    (found,) = records["digits"]["cdcd_warp"]
    assert np.isfinite([found["bits_per_unit"], found["distance"]["value"]]).all()
    assert found["curves"]["steps"] == [0, 1, 2, 3, 4]
    for run in ("digits", "text"):
        curves = {name: adaptive._curves_of(each[0]) for name, each in records[run].items()}
        kept = curves["static"].weighting
        np.testing.assert_allclose(curves["ema_bins"].weighting, kept, rtol=1e-5, atol=1e-9)
        moved = curves["cdcd_warp"]
        np.testing.assert_allclose(moved.drawn[0], curves["static"].drawn[0], rtol=1e-3, atol=1e-6)
        assert np.max(np.abs(moved.weighting[-1] / kept[-1] - 1)) > 1e-4
    assert {"digits.gif", "text.gif", "weightings.png", "adaptive.md"} <= {
        path.name for path in tmp_path.iterdir()
    }
    assert adaptive.main(arguments) == 0
    assert runs_in(capsys.readouterr().out) == 0  # nothing is repeated
    assert adaptive.main([f"--workdir={tmp_path}", "--mechanisms=emabins"]) == 2
