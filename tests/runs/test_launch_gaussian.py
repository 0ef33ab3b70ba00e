"""Gaussian runs: the launcher from training to pictures, every recipe, prepared TFDS pictures."""

import io
import json

import jax
import jax.numpy as jnp
import launching
import numpy as np
import pytest
import tiny
from variants import slow_except

from experiments import recipes
from mdm_jax import files, schedules, training
from mdm_jax.gaussian.recipes import RECIPES
from mdm_jax.launch import workdir
from mdm_jax.launch.build import make_experiment
from mdm_jax.launch.gaussian_family import gaussian_recipe
from mdm_jax.launch.modes import evaluate, train
from mdm_jax.launch.presets import digits_gaussian, mnist_gaussian
from mdm_jax.launch.spacing import stored
from mdm_jax.types import Batch

DIGITS = "experiments/configs/digits_gaussian.py:smoke"


pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.first]


@pytest.fixture(scope="module")
def finished(one_device, tmp_path_factory):
    """Directory of a tiny run."""
    workdir = tmp_path_factory.mktemp("gaussian") / "run"
    config = digits_gaussian("smoke")
    config.optimizer.name = "adamw"  # compiles in half the time
    config.variance.order = ("stratified", "ema_bins")
    config.variance.ema_bins.warmup_steps = 1
    experiment = make_experiment(config)
    assert train.train(experiment, workdir)
    evaluate.report(experiment, workdir)
    return workdir


def test_a_run_ends_with_the_bound_in_its_parts_and_pictures(finished):
    workdir, out = finished, (finished / "report.txt").read_text("utf-8")
    assert "recipe vdm" in out and "bits per dimension" in out
    assert "of which reconstruction" in out and "perplexity" not in out
    record = json.loads((workdir / "evaluation.json").read_text())
    parts = record["parts_bits_per_dimension"]
    assert sum(parts.values()) == pytest.approx(record["bits_per_unit"], rel=1e-6)
    assert list((workdir / "samples").glob("*.png"))
    assert (workdir / "plots/training.png").exists()
    assert not (workdir / "plots/levels.png").exists()
    evaluated = training.read_metrics(workdir / "metrics.jsonl", "evaluate")
    assert [r["step"] for r in evaluated] == [2, 4]
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.parametrize("mode", ["evaluate", "sample"])
def test_a_finished_run_can_be_looked_at_again(finished, mode, monkeypatch, capsys):
    code, out, _ = launching.call(
        monkeypatch,
        capsys,
        f"--workdir={finished}",
        f"--mode={mode}",
        "--config.sample.sampler=ddim",
        "--config.sample.grid=edm",
    )
    assert code == 0
    assert ("of which reconstruction" if mode == "evaluate" else "samples") in out


@pytest.mark.slow
def test_grids_are_compared_and_the_best_is_sampled_along(finished, monkeypatch, capsys):
    """By two samplers in one workdir: the grid stored for one is not taken by the other."""
    line = (f"--workdir={finished}", "--config.sample.sampler=ddim")
    two = '--config.spacing.samplers=("ddim","dpm_solver_pp_3m")'
    spacing = ("--mode=spacing", *line, "--steps=2,3", two)
    code, out, err = launching.call(monkeypatch, capsys, *spacing)
    assert code == 0, err
    names = {path.name for path in (finished / "spacing").iterdir()}
    for sampler in ("ddim", "dpm_solver_pp_3m"):
        plots = {f"{sampler}-{name}.png" for name in ("distance", "grids", "pictures-3")}
        assert plots | {f"{sampler}-2.json", f"{sampler}-3.json"} <= names
    assert "| ddim | search | " in out and "as many training rows: " in out
    path = finished / "spacing" / "ddim-3.json"
    record = json.loads(path.read_text("utf-8"))
    found = {name: np.array(grid["levels"]) for name, grid in record["grids"].items()}
    rules = {"law", "uniform_logsnr", "edm_rho", "cosine"}
    assert {*found} == rules | {
        *("equal information", "equal error", "learned density"),
        *("align steps, curve", "align steps, pairs", "search"),
    }
    for name, grid in found.items():
        assert name in out and grid.shape == (4,) and np.all(np.diff(grid) > 0)
        assert grid[0] == -8 and grid[-1] == 8
    np.testing.assert_allclose(found["uniform_logsnr"], np.linspace(-8, 8, 4), atol=1e-5)
    assert np.abs(found["learned density"] - found["law"]).max() > 1e-3  # of its own law, uniform
    means = {name: np.mean(grid["distances"]) for name, grid in record["grids"].items()}
    assert means[record["best"]] == min(means.values())
    bounds = {name: grid["bound"] for name, grid in record["grids"].items()}
    assert bounds["align steps, curve"] == min(bounds.values())

    sample = ("--mode=sample", *line, "--steps=3")
    _, out, _ = launching.call(monkeypatch, capsys, *sample)
    assert f"grid: {record['best']}, of {path}" in out
    _, out, _ = launching.call(monkeypatch, capsys, *sample, "--config.sample.grid=edm")
    assert "grid: edm" in out
    _, out, _ = launching.call(monkeypatch, capsys, *sample, "--config.sample.sampler=heun_flow")
    assert "grid: the default rule" in out


def test_a_stored_grid_is_the_one_that_is_sampled_along(finished):
    config = workdir.saved_config(finished)
    config.sample.update(sampler="ddim", num_steps=2)
    config.gaussian.output = "x0"
    experiment = make_experiment(config)
    params = tiny.perturbed(experiment.initial_state().params, seed=0)
    canvas = np.full((4, 64), 17)
    levels = [-8.0, 1.5, 8.0]
    path = finished / "spacing" / "ddim-2.json"
    path.parent.mkdir(exist_ok=True)
    files.write_json(path, {"best": "mine", "grids": {"mine": {"levels": levels}}})
    generate, _ = stored.stored_generator(experiment, finished, 2)
    drawn = generate(params, jax.random.key(1), canvas)
    explicit = experiment.family.generator(2, np.array([-8.0, 1.5, np.inf]))
    np.testing.assert_array_equal(drawn, explicit(params, jax.random.key(1), canvas))
    assert np.any(drawn != experiment.generate(params, jax.random.key(1), canvas))
    path.write_text('{"best": "mine", "grids": {"mine": {"levels": [3, 2]}}}', "utf-8")
    with pytest.raises(ValueError, match=r"ddim-2.json is damaged .*increases.*mdm spacing"):
        stored.stored_generator(experiment, finished, 2)


def one_step(config):
    experiment = make_experiment(config)
    rows, length = config.train.batch_size, experiment.dataset.length
    shape = (rows, length)
    batch = Batch(
        *(jax.ShapeDtypeStruct(shape, d) for d in (jnp.int32, jnp.bool_, jnp.int32)),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )
    state = experiment.abstract_state()
    after, _ = jax.eval_shape(experiment.step, state, batch)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    return experiment


def test_runs_that_differ_in_the_law_alone_share_the_program_of_a_step():
    """As those of mdm tune-levels, which would each be compiled anew; another law has its own."""

    def program(law, **settings):
        config = digits_gaussian("smoke")
        config.train.monitors = ()  # which bin the losses by the law
        config.optimizer.name = "adamw"
        config.gaussian.update(law=law, weighting="unit_output")
        config.gaussian[law].update(settings)
        e = make_experiment(config)
        return str(jax.make_jaxpr(e.step)(e.abstract_state(), e.abstract_batch(), *e.constants))

    first = program("lognormal", mean=-1.2, std=1.2)
    assert program("lognormal", mean=0.5, std=0.7) == first != program("flow_shifted")


@pytest.mark.parametrize("recipe", slow_except({"vdm"}, sorted(RECIPES)))
def test_recipes_differ_in_law_weighting_and_output_alone(recipe):
    config, base = digits_gaussian(recipe), digits_gaussian()
    config.gaussian.recipe = base.gaussian.recipe
    assert config.to_dict() == base.to_dict()
    experiment = one_step(recipes.configure(recipe, smoke=True))
    assert experiment.bias() == ("truncated" if recipe == "vdm" else "biased")
    low, high = gaussian_recipe(experiment.config.gaussian).law.support
    assert -8 <= low < high <= 8


SPELLED = {  # law, weighting, output, path
    "ddpm": ("ddpm_linear", "unit_output", "eps", "vp"),
    "iddpm": ("cosine", "unit_output", "eps", "vp"),
    "vdm": ("uniform_logsnr", "elbo", "eps", "vp"),
    "v_prediction": ("cosine", "unit_output", "v", "vp"),
    "edm": ("lognormal", "unit_output", "edm", "ve"),
    "edm2": ("edm2_lognormal", "unit_output", "edm", "ve"),
    "flow": ("flow", "unit_output", "flow", "flow"),
    "sd3": ("sd3_logit_normal", "unit_output", "flow", "flow"),
    "indi": ("indi", "unit_output", "x0", "flow"),
}


@pytest.mark.parametrize("name", slow_except({"vdm", "edm"}, RECIPES))
def test_a_recipe_is_a_preset_of_its_parts(name):
    """The parts by name, whatever recipe they stand in for."""
    config = digits_gaussian("flow" if name == "ddpm" else "ddpm").gaussian
    config.update(dict(zip(("law", "weighting", "output", "path"), SPELLED[name])))
    spelled, recipe = gaussian_recipe(config), gaussian_recipe(digits_gaussian(name).gaussian)
    levels = np.linspace(-7.9, 7.9, 9)

    def curves(r):
        return (
            r.law.log_pdf(levels),
            r.weighting.log_weight(levels),
            *r.output.coefficients(r.path, levels),
            r.path.log_alpha(levels),
        )

    for got, expected in zip(curves(spelled), curves(recipe)):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_zero_terminal_rescale_reaches_pure_noise():
    """Levels are drawn below ``low``, with weight, and sampling starts at pure noise."""
    config = digits_gaussian("smoke")
    config.gaussian.update(recipe="ddpm", modifiers=("zero_terminal",), output="v")
    with pytest.raises(ValueError, match="draws levels below -10.05, where .* set .*unit_output"):
        gaussian_recipe(config.gaussian)
    config.gaussian.weighting = "unit_output"
    recipe = gaussian_recipe(config.gaussian)
    low, high = (float(end) for end in recipe.law.support)
    assert low == -np.inf and high == 8
    # Lin et al. 2024: alpha - alpha_T, scaled so that the clean end keeps its alpha.
    base = gaussian_recipe(digits_gaussian("ddpm").gaussian).law
    alpha = np.sqrt(1 / (1 + np.exp(-np.array([*base.support, base.icdf(0.3)], np.float64))))
    rescaled = (alpha[2] - alpha[0]) * alpha[1] / (alpha[1] - alpha[0])
    found = np.sqrt(1 / (1 + np.exp(-float(recipe.law.icdf(0.3)))))
    assert found == pytest.approx(rescaled, rel=1e-5)
    below = np.array([-30.0, -12.0, -8.5])
    weight = recipe.log_importance_weight(below)
    # Unit weight on v: eps errors count by c = 1 / alpha^2.
    np.testing.assert_allclose(weight, np.log1p(np.exp(-below)), atol=0.02)
    config.sample.update(sampler="ddim", grid="trailing", num_steps=3)
    experiment = make_experiment(config)
    levels = experiment.family.levels("trailing", 3)
    assert levels[0] == -np.inf and levels[-1] == np.inf
    params = experiment.initial_state().params  # v = 0, so x0 = alpha x: no information, grey
    drawn = experiment.generate(params, jax.random.key(0), np.full((64, 64), 17))
    assert 7.5 < np.mean(drawn) < 8.5 and np.std(drawn) > 0
    config.gaussian.output = ""  # eps
    with pytest.raises(
        ValueError, match="output eps .* does not determine the data at logSNR -inf"
    ):
        make_experiment(config)


def test_another_law_leaves_what_is_minimised_alone():
    config = digits_gaussian("v_prediction")
    before = gaussian_recipe(config.gaussian)
    config.gaussian.law = "lognormal"
    after = gaussian_recipe(config.gaussian)
    levels = np.linspace(-7, 7, 9)
    assert not np.allclose(before.law.log_pdf(levels), after.law.log_pdf(levels), atol=0.1)
    np.testing.assert_array_equal(
        before.weighting.log_weight(levels), after.weighting.log_weight(levels)
    )


def test_a_canvas_is_filled_with_grey_values():
    config = digits_gaussian("smoke")
    config.sample.update(grid="uniform_logsnr", num_steps=3, sampler="ddim")
    experiment = make_experiment(config)
    params = experiment.initial_state().params
    canvas = np.full((5, 64), experiment.dataset.mask_id)
    drawn = experiment.generate(params, jax.random.key(0), canvas)
    assert drawn.shape == (5, 64) and drawn.dtype == np.int32
    assert drawn.min() >= 0 and drawn.max() <= 16


@pytest.mark.parametrize(
    "setting, words",
    [
        ("--config.gaussian.recipe=edn", "did you mean 'edm'"),
        ("--config.gaussian.law=linear", "gaussian.law"),
        ("--config.sample.grid=flo", "sample.grid"),
        ("--config.sample.sampler=first_hitting", "sample.sampler: unknown name"),
        ("--config.data.source=embedded", "needs pictures"),
        ("--config.process=gausian", "did you mean 'gaussian'"),
        ("--config.weighting.name=p2", "does not read weighting.name='p2', leave it at ''"),
        ("--config.law.name=power", "does not read law.name='power', leave it at 'linear'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(setting, words, tmp_path, monkeypatch, capsys):
    code, _, err = launching.call(
        monkeypatch, capsys, f"--config={DIGITS}", f"--workdir={tmp_path / 'run'}", setting
    )
    assert code == 2 and words in err
    assert not (tmp_path / "run").exists()


def test_a_masked_run_refuses_a_gaussian_law_by_its_place(tmp_path, monkeypatch, capsys):
    code, _, err = launching.call(
        monkeypatch,
        capsys,
        f"--config={launching.QUICKSTART}",
        f"--workdir={tmp_path / 'run'}",
        "--config.law.name=flow",
    )
    assert code == 2 and "law.name" in err and "Gaussian schedules: gaussian.law" in err


@pytest.mark.slow
def test_a_recipe_is_measured(tmp_path):
    """A few steps: every figure is there."""
    experiment = make_experiment(recipes.configure("edm", steps=3, smoke=True))
    assert train.train(experiment, tmp_path / "edm")
    record = recipes.measure(experiment, tmp_path / "edm", samples=8)
    assert np.isfinite([record["bits_per_dimension"], record["distance"]]).all()
    assert record["distance_of_data"] < record["distance"]
    assert set(record["gradient_noise"]) == {"independent", "chain"}
    assert "| edm |" in recipes.table({"edm": record})


def test_the_table_of_recipes():
    noise = {"value": 9.871, "standard_error": 0.234, "unsettled": ""}
    record = {"bits_per_dimension": 2.1704, "standard_error": 0.0026, "distance": 0.1364}
    record |= {"distance_of_data": 0.1028}
    record["gradient_noise"] = {"independent": noise, "chain": dict.fromkeys(noise)}
    assert recipes.table({"edm": record}).splitlines()[-1] == (
        "| edm | 2.170 ± 0.003 | 0.136 (0.103) | 9.87 ± 0.23 | not settled |"
    )
    with pytest.raises(ValueError, match="variants"):
        recipes.configure("edn")


def test_prepared_pictures_of_tfds(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    image = pytest.importorskip("PIL.Image")
    tfds.disable_progress_bar()

    class LocalDigits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            picture = tfds.features.Image(shape=(8, 8, 1))
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {"image": picture, "label": tfds.features.ClassLabel(num_classes=4)}
                ),
            )

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples(40) for name in ("train", "test")}

        def _generate_examples(self, count):
            for i in range(count):
                stream = io.BytesIO()
                image.fromarray(np.full((8, 8), 6 * i, np.uint8)).save(stream, "png")
                yield i, {"image": stream.getvalue(), "label": i % 4}

    LocalDigits(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    config = mnist_gaussian("smoke")
    config.data.update(name="local_digits", data_dir=str(tmp_path))
    config.data.splits = ("train[:30]", "train[30:]", "test")
    experiment = one_step(config)
    assert experiment.dataset.length == 64 and experiment.model.patch_size == 4
    for row in experiment.dataset.train:
        assert set(row.documents) == {2 + row.tokens[0] // 6 % 4}
    assert experiment.dataset.num_classes == 4
    config.data.stream = True
    with pytest.raises(ValueError, match="streamed come without classes"):
        make_experiment(config)
    assert isinstance(gaussian_recipe(config.gaussian).law, schedules.Law)
    assert mnist_gaussian("edm").data.name == "mnist"
