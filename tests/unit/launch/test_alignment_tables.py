"""Tables of ``mdm variance`` for runs on preferences and rewards."""

import contextlib
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from mdm_jax import alignment, variance
from mdm_jax.launch.alignment import estimator_table
from mdm_jax.launch.alignment.estimator_table import Kind, Moments
from mdm_jax.launch.families import alignment_details
from mdm_jax.launch.modes import evaluate


def kinds(**refused):
    chain = variance.chain(variance.stratified())
    made = {"trace": Kind(None, chain, ""), "coupled": Kind(None, chain, "")}
    made["spg"] = Kind(None, alignment.replicated(chain, 2), "")
    return made | {name: Kind(None, None, why) for name, why in refused.items()}


def test_methods_are_compared_at_the_same_passes():
    """Cosine 0.8 and noise over signal 3 for one draw of three passes: 0.8 / sqrt(1 + 9 / F)."""
    groups = [
        {
            "trace": Moments(variance=8.0 * s, signal=4.0 * s, product=4.0 * s),
            "coupled": Moments(variance=3.0 * s, signal=1.0 * s, product=1.6 * s),
            "spg": Moments(variance=1.0, signal=-0.1, product=0.0),
        }
        for s in (1.0, 2.0)
    ]
    found = estimator_table.summarise(kinds(d1="why not"), groups)
    assert found["d1"] == {"policy_gradient": "biased", "refused": "why not"}
    trace, coupled, spg = (found[name] for name in ("trace", "coupled", "spg"))
    assert (trace["policy_gradient"], trace["passes"], coupled["passes"]) == ("exact", 1, 3)
    assert spg["passes"] == 2 and spg["cosine"] is None and spg["cosine_at_passes"] == {}
    assert trace["cosine"] == pytest.approx(1) and coupled["cosine"] == pytest.approx(0.8)
    assert coupled["cosine_standard_error"] == pytest.approx(0, abs=1e-9)
    assert coupled["noise_to_signal_times_passes"] == pytest.approx(9)
    at = coupled["cosine_at_passes"]
    assert "2" not in at and at["4"] == pytest.approx(0.8 / np.sqrt(1 + 9 / 4))
    assert trace["cosine_at_passes"]["1"] == pytest.approx(1 / np.sqrt(3))
    text = estimator_table._estimators(found, 8)
    assert "the same 8 answers" in text and "not measured: why not" in text
    assert "no signal" in text and "0.58*" in text
    # Without traces there is no direction to compare with.
    apart = [{"coupled": group["coupled"]} for group in groups]
    without = estimator_table.summarise({"coupled": kinds()["coupled"]}, apart)
    assert without["coupled"]["cosine"] is None


def test_what_sharing_removes_is_said_in_words():
    shown = {"shared": 2.0, "shared_standard_error": 0.1, "independent": 30.0}
    shown |= {"independent_standard_error": None, "factor": 15.0}
    assert "15 times less" in estimator_table._sharing(shown)
    equal = shown | {"shared": 0.0, "factor": None}
    assert "policy and reference are equal" in estimator_table._sharing(equal)
    below = estimator_table._sharing(shown | {"shared": -0.01, "factor": None})
    assert "not told from nothing" in below and "equal" not in below


@pytest.mark.parametrize("error, shown", [(0.0, "0.000"), (None, "unknown"), (0.25, "0.250")])
def test_an_error_of_zero_is_printed_as_zero(error, shown):
    names = [f"preference_{name}" for name in ("accuracy", "margin", "loss")]
    record = dict.fromkeys(names, 1.0) | {f"{n}_standard_error": error for n in names}
    record |= {f"{n}_monte_carlo_error": None for n in names}
    record |= {"reward": 1.0, "reward_standard_error": error, "rewarded_answers": 4, "solved": 1.0}
    pairs, reward = alignment_details(record)
    assert pairs.count(f"1.000 ± {shown}") == 3 and f"reward 1.000 ± {shown} over" in reward


@pytest.mark.parametrize("method, rows", [("dpo", 24), ("trace", 8)])
def test_the_bar_of_final_figures_counts_what_is_run(method, rows, monkeypatch):
    """Both answers of 12 pairs (of 30, evaluate.max_rows), or 8 prompts (sample.num_answers)."""
    sections = {"alignment": {"method": method}, "evaluate": {"max_rows": 12}}
    config = ConfigDict(sections | {"sample": {"num_answers": 8, "num_steps": 4}})
    experiment = types.SimpleNamespace(config=config, held_out=("test", range(30)))
    seen = []

    @contextlib.contextmanager
    def bar(count, description, check):
        seen.append(count)
        yield None

    monkeypatch.setattr(evaluate, "_progress_bar", bar)
    monkeypatch.setattr(evaluate, "stored_generator", lambda *_: (None, None))
    monkeypatch.setattr(evaluate, "final_figures", lambda *_: {})
    assert evaluate._of_alignment(experiment, None, None, None) == {} and seen == [rows]
