"""The mode ``variance`` on the smoke-sized quickstart; its recommendation on made-up numbers."""

import csv
import dataclasses
import json
import types

import commands
import jax
import launching
import numpy as np
import pytest
import tiny
import zoo

from mdm_jax import meter, variance
from mdm_jax.draws import DrawSpec
from mdm_jax.files import read_json, write_json
from mdm_jax.launch import names, presets
from mdm_jax.launch.auto import fit
from mdm_jax.launch.build import make_experiment
from mdm_jax.launch.config import MeasureSettings
from mdm_jax.launch.modes import measure as mode
from mdm_jax.launch.modes.variance_report import BASELINE, format_table, recommend
from mdm_jax.launch.workdir import WorkdirError, claim, command
from mdm_jax.meter import levels, nested
from mdm_jax.meter.efficiency import Efficiency
from mdm_jax.variance.ppots import EprFit, EprParameters, epr_density

SETTINGS = MeasureSettings(
    rows=4,
    levels_per_row=2,
    probes=1,
    grid_rows=2,
    grid_levels=6,
    grid_masks=2,
    groups=4,
    redraws=12,
    data_batches=4,
    warm_up=2,
    chunk=16,
)


def refuse(_table):
    raise ValueError("this method wants an odd batch")


@pytest.fixture(scope="module")
def experiment():
    """With a network that compiles quickly."""
    config = presets.quickstart("smoke")
    config.optimizer.name = "adamw"
    config.variance.order = ("stratified", "mirror")
    config.measure.fit.update(levels=9, rows=4, masks=2)
    with pytest.MonkeyPatch.context() as patch:
        launching.on_one_device(patch)
        return tiny.with_small_network(make_experiment(config))


@pytest.fixture(scope="module")
def measured(tmp_path_factory, experiment):
    """(record, directory)."""
    workdir = tmp_path_factory.mktemp("variance")
    methods = mode.named(["stratified, ppots binned", "antithetic_pairs"], experiment)
    methods["odd"] = mode.Method(refuse)
    record = mode.measure(experiment, workdir, methods, SETTINGS)
    return record, workdir


def test_adaptive_methods_learn_from_as_many_batches_as_were_asked_for():
    bench = object.__new__(mode._Bench)
    bench.experiment = types.SimpleNamespace(
        apply_fn=tiny.apply_fn,
        key=lambda *_: jax.random.key(0),
        spec=DrawSpec(4, 1, (tiny.LENGTH,)),
        dataset=types.SimpleNamespace(length=tiny.LENGTH),
    )
    bench.params, bench.warm_up = tiny.params(), [tiny.batch(4, seed) for seed in range(2)]
    bench.settings = dataclasses.replace(SETTINGS, warm_up=5)
    transform = variance.ppots_slopes()
    state = bench._warmed_up(tiny.objective(), transform, transform.init(bench.experiment.spec))
    assert state.steps == 5 and state.rejected == 0 and np.any(state.second > 0)


def test_every_method_is_in_the_record(measured):
    record, _ = measured
    assert list(record["methods"]) == [
        BASELINE,
        "stratified, ppots binned",
        "antithetic_pairs",
        "odd",
        mode.CONFIGURED,
    ]
    assert record["step"] is None
    assert record["parameters"] == "a fresh model"
    assert record["methods"][BASELINE]["efficiency"]["passes"] == 1
    assert record["methods"][mode.CONFIGURED]["chain"] == "chain(stratified, mirror)"
    assert record["methods"]["odd"]["refused"] == "this method wants an odd batch"
    own = record["methods"][mode.CONFIGURED]["gradient"]
    assert own["total"] == pytest.approx(own["pattern"] + own["rate"] + own["data"])


def test_files_hold_what_the_record_holds(measured):
    record, workdir = measured
    folder = workdir / "variance"
    assert {str(path) for path in folder.iterdir()} == set(record["files"])
    assert len(record["files"]) == 9
    assert json.loads((folder / "variance.json").read_text("utf-8")) == record
    with (folder / "variance.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == list(record["methods"])
    for line in lines:
        method = record["methods"][line["method"]]
        if not method["refused"]:
            assert float(line["gradient_pattern"]) == method["gradient"]["pattern"]
            figure = method["efficiency"]["variance_times_passes"]
            assert line["variance_times_passes"] == ("" if figure is None else str(figure))
            figure = method["training"]["variance"]
            assert line["training_variance"] == ("" if figure is None else str(figure))


def test_training_batches_have_equally_many_passes_and_rows_of_their_own(measured):
    """Rows drawn anew add variance; two views have half the rows, so their figure is of a batch."""
    record, _ = measured
    alone, views = (record["methods"][name] for name in (BASELINE, mode.CONFIGURED))
    assert (alone["training"]["passes"], views["training"]["passes"]) == (1, 2)

    def plain(figure):  # of few redraws of a fresh model, which may not have settled
        return np.mean(figure["group_variances"])

    assert plain(alone["training"]) > 1.05 * plain(alone["efficiency"])
    # Two views of the whole batch cost twice the passes of the training batch.
    assert plain(views["training"]) > 1.05 * 2 * plain(views["efficiency"])


def test_table_names_every_method_and_the_recommendation(measured):
    record, _ = measured
    text = format_table(record)
    for name in record["methods"]:
        assert any(line.startswith(name) for line in text.splitlines())
    assert "not measured: this method wants an odd batch" in text
    assert text.splitlines()[-1].startswith("recommended: ")


def test_any_chain_of_registered_transforms_is_a_method():
    config = presets.quickstart("smoke")
    config.variance.clipped.update(low=0.25, high=0.75)
    config.variance.ppots_parametric.parameters = FITTED.parameters
    config.variance.ppots_unweighted.parameters = FITTED.parameters
    config.measure.methods = (*names.VARIANCE, "stratified,ema_bins_second_moment, mirror")
    experiment = make_experiment(config)
    methods = mode.named(config.measure.methods, experiment)
    assert list(methods) == [BASELINE, *config.measure.methods]
    built = {name: method.build(None) for name, method in methods.items()}
    assert built["stratified,ema_bins_second_moment, mirror"].name == (
        "chain(stratified, ema_bins, mirror)"
    )
    assert built["clipped_mixture"].bias == "exact" and built["clipped"].bias == "truncated"
    assert list(mode.named(["mirror", BASELINE], experiment)) == [BASELINE, "mirror"]
    config.measure.methods = ("stratified, miror",)
    with pytest.raises(ValueError, match="did you mean 'mirror'"):
        make_experiment(config)


def test_table_of_methods_builds_and_covers_the_library(measured):
    """Every listed method builds from a level table; every public transform is in some chain."""
    values = np.array([4.0, 3.0, 2.5, 2.0, 1.5, 1.0])
    moments = nested.CrossedMoments(values, values, values, 3 * values, values**2)
    rates = meter.rate_grid(6)
    table = meter.LevelTable(
        masking_rates=rates,
        quantiles=1 - rates,
        base_density=np.ones(6),
        loss=levels.Moments(moments, moments),
        gradient=levels.Moments(moments, moments),
        nats_per_token=values,
        rows=2,
        masks_per_level=2,
        passes=1,
        rows_left_out=0,
    )
    names = set()
    for name, method in mode.METHODS.items():
        built = method.build(table)
        assert built.bias == ("truncated" if name == "clipped" else "exact"), name
        names |= {member.name for member in built.members or (built,)}
    public = set(zoo.SINGLES)
    # The mode measures a clipped range once, searching for it is the trainer's business; it
    # measures plain masked runs; and transforms that change the objective have no variance to
    # compare.
    other = {"clipped_adaptive", "stratified_blocks"}
    other |= {"uncertainty_weighting", "cdcd_warp", "cdtd_warp", "ppots_unweighted"}
    assert public - {"importance"} - other == names


def test_the_curve_of_ppots_is_fitted_and_stored_once(experiment, tmp_path, monkeypatch):
    """The printed command is read by the launcher, and its density is the measured one."""
    workdir, shown = tmp_path / "run", []
    claim(workdir, experiment.config)
    started = ["mdm", "variance", "--config", "quickstart:smoke", "--workdir", str(workdir)]
    started += ["--fit", "--config.seed=3", '--config.variance.order=("mirror",)']
    write_json(workdir / "run.json", {"command": command(started)})
    params = tiny.perturbed(experiment.initial_state().params, scale=2.0)  # unequal losses
    monkeypatch.setattr(fit.measure, "parameters", lambda run, _: (run, None, params, None))
    paths = fit.fit(experiment, workdir, shown.append)
    record = read_json(paths[0])
    assert {str(path) for path in (workdir / "variance").iterdir()} == set(paths)
    assert record["divergence"] < 0.05 and f"{record['divergence']:.2g} nats" in shown[0]
    line = shown[0].splitlines()[-1].strip()
    assert line == record["command"]
    words = commands.words_of(line)
    commands.check(commands.Command("the printed line", words))
    assert f"--workdir={workdir}-ppots" in words and "--config.seed=3" in words
    assert not any(word.startswith("--fit") or "mirror" in word for word in words)
    worker = ["experiments/study/__main__.py", "--suite=small", "--worker=0"]  # without a config
    write_json(workdir / "run.json", {"command": command(worker)})
    curve = EprFit(EprParameters(**record["parameters"]), record["divergence"])
    assert line.endswith(" " + fit.training_command(workdir, curve))
    assert fit.training_command(workdir, curve).startswith("--config.variance.order=")
    given = next(word for word in words if "parameters" in word).partition("=")[2]
    assert given == "(" + ",".join(f"{p:g}" for p in record["parameters"].values()) + ")"
    # Of uniform cells of the rate 1 - u, the middles of which were measured.
    levels, density = record["levels"], epr_density([*record["parameters"].values()], 1e-6)
    np.testing.assert_allclose(levels["quantiles"], 1 - np.arange(1, 10) / 10, rtol=1e-5)
    measured = np.sqrt(np.square(levels["loss"]["mean"]) + np.maximum(levels["loss"]["pattern"], 0))
    fitted = np.exp(density.log_pdf(np.asarray(levels["quantiles"])))
    ratio = (fitted / fitted.mean()) / (measured / measured.mean())
    assert np.abs(ratio - 1).max() < np.ptp(np.log(measured)) / 3
    with pytest.raises(WorkdirError, match="rename or remove it"):
        fit.fit(experiment, workdir)


def test_the_parametric_density_is_fitted_over_the_quantile(monkeypatch):
    """Under another law than the uniform rate 1 - u is another number than the rate."""
    seen = []
    monkeypatch.setattr(names, "fit_epr", lambda *given: seen.append(given) or FITTED)
    rates = meter.rate_grid(6)
    values = np.linspace(4.0, 1.0, 6)
    moments = nested.CrossedMoments(values, values, values, 3 * values, values**2)
    both = levels.Moments(moments, moments)
    table = meter.LevelTable(
        rates, 1 - np.sqrt(rates), rates, both, both, values, 2, 2, 1, rows_left_out=0
    )
    mode.METHODS["ppots, parametric"].build(table)
    np.testing.assert_allclose(seen[0][0], np.sqrt(rates))


FITTED = EprFit(EprParameters(0.5, 2.0, 0.6, 1.5, 3.0, 1.2, 2.0), 0.0)


@dataclasses.dataclass(frozen=True)
class Made:
    """What the recommendation reads of a result."""

    efficiency: Efficiency | None
    bias: str = "exact"
    chain_bias: str = "exact"


def made(variances, passes=1, bias="exact", unsettled=""):
    figure = Efficiency(np.asarray(variances, float), 1.0, passes, 8, 0.05, 3.0, unsettled)
    return Made(figure, bias, bias)


def test_recommendation_is_the_least_variance_per_compute_of_the_exact_ones():
    noise = np.array([-0.1, 0.0, 0.1, 0.05])
    results = {
        BASELINE: made(4 + noise),
        "one": made(3 - noise),
        "two views": made(1 + noise / 2, passes=2),
        "two noisy views": made(1.1 + 4 * noise[::-1], passes=2),
        "clipped": made(0.1 + noise / 100, bias="truncated"),
        "wild": made(0.2 + noise, unsettled="the variance has not settled: ..."),
        "refused": Made(None, ""),
    }
    found = recommend(results)
    assert found["name"] == "two views"
    assert found["tied"] == ["two noisy views"]
    assert found["versus"][BASELINE]["ratio"] == pytest.approx(2.0125 / 4.0125, rel=0.01)
    assert found["versus"]["one"]["standard_errors"] < -5
    assert "50% below independent draws" in found["text"]
    assert "not told apart from: two noisy views" in found["text"]
    nothing = recommend({"wild": results["wild"], "clipped": results["clipped"]})
    assert nothing["name"] is None
    assert "no exact method" in nothing["text"]
    # Under a truncated objective every label is truncated; what adds nothing counts as exact.
    own = {name: dataclasses.replace(result, bias="truncated") for name, result in results.items()}
    assert own["clipped"].bias == own["one"].bias == "truncated"
    assert recommend(own)["name"] == "two views"
    worse = own | {"biased": made(0.1 + noise / 100, bias="biased")}
    assert recommend(worse)["name"] == "two views"
