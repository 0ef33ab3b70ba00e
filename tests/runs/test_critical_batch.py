"""Steps to a target by batch: crossings, the law that is fitted, tables, resuming, kept results."""

import json
import sys

import numpy as np
import pytest

from experiments.study import critical_batch
from mdm_jax.launch.workdir import WorkdirError


def test_a_crossing_is_linear_in_the_logarithm_of_steps():
    curve = [(10, 4.0), (20, 3.0), (40, 3.2), (80, 2.0)]
    assert critical_batch.crossing(curve, 3.5) == pytest.approx(10 * 2**0.5)
    assert critical_batch.crossing(curve, 3.0) == pytest.approx(20)  # the first time
    assert critical_batch.crossing(curve, 2.6) == pytest.approx(40 * 2**0.5)
    assert critical_batch.crossing(curve, 1.9) is None
    assert critical_batch.crossing(curve, 4.5) is None  # reached before the first evaluation


def test_the_law_of_the_steps_is_found_again():
    steps = {b: 70 * (1 + 90 / b) for b in critical_batch.BATCHES}
    assert critical_batch.fit(steps) == pytest.approx((70, 90, 0), rel=1e-5, abs=1e-6)


def test_the_error_of_a_fit_is_that_of_repeated_noise():
    generator = np.random.default_rng(0)
    batches = np.array(critical_batch.BATCHES)
    fits = []
    for noise in 0.05 * generator.standard_normal((200, len(batches))):
        steps = 70 * (1 + 60 / batches) * np.exp(noise)
        fits.append(critical_batch.fit(dict(zip(batches.tolist(), steps))))
    _, critical, errors = np.array(fits).T
    assert np.log(critical).std() == pytest.approx(np.sqrt(np.mean(errors**2)), rel=0.15)


@pytest.mark.parametrize("law", [lambda b: 100 + 0 * b, lambda b: 4000 / b, lambda b: 100 + b])
def test_steps_that_tell_no_critical_batch_have_none(law):
    steps = {b: law(b) for b in critical_batch.BATCHES}
    assert critical_batch.fit(steps) is None
    record = _record("standard", 4, 0, 40)
    records = [
        record | {"batch": b, "curve": [[n * f, bits] for f, bits in ((0.5, 4.0), (2, 3.0))]}
        for b, n in steps.items()
    ]
    found = critical_batch.summarise(records)
    assert "critical_batch" not in found[0] and found[0]["steps"][0][4] is not None
    assert "| - | - | - | - |" in critical_batch.table(found)


def _record(method, batch, seed, critical):
    least = 50 * (1 + critical / batch)
    return {"method": method, "batch": batch, "seed": seed, "factor": 1.0} | {
        "curve": [[least * f, bits] for f, bits in ((0.5, 3.8), (0.8, 3.6), (1, 3.35), (2, 3.1))]
    }


def test_the_critical_batch_is_a_mean_over_seeds():
    records = [_record("standard", b, s, 40 + 20 * s) for b in (4, 16, 64) for s in (0, 1)]
    found = critical_batch.summarise(records)
    assert [entry["target"] for entry in found] == [3.5, 3.35, 3.2]
    middle = found[1]
    assert middle["critical_batch"] == pytest.approx((50, 10), rel=1e-4)
    assert middle["least_steps"] == pytest.approx((50, 0), abs=1e-3) and middle["residual"] < 1e-5
    shown = critical_batch.table([middle])
    assert "| standard | 3.35 | 675 | 206 | 89 | 50 ± 0 | 50 ± 10 | 1.00 | 0 % |" in shown
    without = critical_batch.table_without([middle])
    assert "without 16" in without and "| standard | 3.35 | - | - | - |" in without
    four = critical_batch.summarise([_record("standard", b, 0, 40) for b in (4, 8, 16, 64)])
    assert four[1]["without"] == pytest.approx(dict.fromkeys((4, 8, 16, 64), 40), rel=1e-3)
    partly = critical_batch.summarise([_record("standard", b, 0, 40) for b in (4, 16)])
    assert "critical_batch" not in partly[0] and "| - | - | - | - |" in critical_batch.table(partly)


def test_runs_have_equal_passes_and_a_constant_rate():
    for batch in (4, 64):
        steps = critical_batch.evaluation_steps(batch)
        assert steps[0] == 2 * critical_batch.SPAN // batch and np.all(np.diff(steps) > 0)
        assert steps[-1] * batch == pytest.approx(critical_batch.MOST, rel=0.2)
    experiment = critical_batch.configured("recommended", 64, 3, 0.5)
    c = experiment.config
    assert experiment.spec.batch_size == 64 and c.seed == 3 and c.optimizer.peak == 0.02
    assert c.optimizer.final_fraction == 1 and c.optimizer.warmup_steps == 10
    assert c.optimizer.ema_decay == 0.9


def test_finished_runs_are_skipped_and_others_refused(tmp_path, monkeypatch):
    trained = []

    def train(experiment, step, bound, lowest):
        trained.append((experiment.spec.batch_size, experiment.config.seed, lowest))
        return [(10, 4.0), (20, 3.0)]

    monkeypatch.setattr(critical_batch, "train", train)
    monkeypatch.setattr(sys, "argv", ["critical_batch", "--batches=64", "--seeds=0"])
    wanted = [("standard", 64, 1.0)]
    critical_batch.run_all(tmp_path, wanted, [0], 2)
    critical_batch.run_all(tmp_path, wanted, [0, 1], 2)
    assert trained == [(64, 0, 3.35), (64, 1, 3.35)]
    critical_batch.run_all(tmp_path, wanted, [0], 1)  # an easier target, which was reached too
    assert len(trained) == 2
    (record, _) = critical_batch.read(tmp_path)
    command = "python -m experiments.study.critical_batch --batches=64 --seeds=0"
    assert record["provenance"]["command"] == command and record["provenance"]["seed"] == 0
    assert record["target"] == 3.35 and record["settings"]["train"]["batch_size"] == 64
    with pytest.raises(WorkdirError, match="target: 3.35 -> 3.2"):
        critical_batch.run_all(tmp_path, wanted, [0], 3)
    monkeypatch.setattr(critical_batch, "MOST", 64_000)
    with pytest.raises(WorkdirError, match="train.steps: 500 -> 1000"):
        critical_batch.run_all(tmp_path, wanted, [0], 2)
    path = tmp_path / "runs/standard-64-0-1.json"
    path.write_text(json.dumps({name: record[name] for name in ("method", "curve")}), "utf-8")
    with pytest.raises(WorkdirError, match="does not say how"):
        critical_batch.run_all(tmp_path, wanted, [0], 2)
    assert len(trained) == 2


def _main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["critical_batch", *arguments])
    return critical_batch.main()


def test_kept_results_are_chosen_from_and_keep_their_provenance(tmp_path, monkeypatch, capsys):
    given = ("--results=critical_batch", f"--workdir={tmp_path / 'kept'}")
    chosen = ("--methods=standard", "--batches=4,16,64", "--seeds=0")
    assert _main(monkeypatch, *given, *chosen) == 0
    printed = capsys.readouterr().out
    assert "| standard | 3.2 | 1241 | 390 | 146 |" in printed and "autoregressive" not in printed
    written = json.loads((tmp_path / "kept/critical_batch.json").read_text("utf-8"))
    kept = json.loads((critical_batch.RESULTS / "critical_batch.json").read_text("utf-8"))
    assert written["provenance"] == kept["provenance"]
    assert sorted(r["batch"] for r in written["runs"]) == [4, 16, 64]
    assert (tmp_path / "kept/critical_batch.png").exists()
    assert _main(monkeypatch, *given, "--seeds=7") == 2
    assert "no such run" in capsys.readouterr().err
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(SystemExit):
        _main(monkeypatch, f"--workdir={tmp_path / 'file'}")
    assert "--workdir" in capsys.readouterr().err
