"""Every config file builds, fits together, and passes the shapes of one training step."""

import importlib
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import slow_except

from mdm_jax import data, variance
from mdm_jax.launch import config as launch_config
from mdm_jax.launch import datasets, names, workdir
from mdm_jax.launch.build import make_experiment
from mdm_jax.launch.gaussian_family import gaussian_levels, gaussian_recipe
from mdm_jax.launch.start import scaled
from mdm_jax.types import Batch

pytestmark = pytest.mark.first

FOLDER = pathlib.Path(__file__).parents[2] / "experiments/configs"
NAMES = sorted(
    ".".join(path.relative_to(FOLDER).with_suffix("").parts)
    for path in FOLDER.rglob("*.py")
    if path.stem not in ("__init__", "settings")  # settings: what several configs share
)


def _get_config(name, *variant):
    return importlib.import_module(f"experiments.configs.{name}").get_config(*variant)


def _has_variants(name):
    function = importlib.import_module(f"experiments.configs.{name}").get_config
    return bool(inspect.signature(function).parameters)


FROM_SOURCE = {"finetune", "finetune_pairs", "convert", "study.finetune", "study.gsm8k"}
CORPORA = {f"benchmarks.{name}" for name in ("text8", "lm1b", "openwebtext")}
NEEDS_DATA = {"mnist_gaussian", "study.pairs", "preference"} | FROM_SOURCE | CORPORA
"""Read prepared data, or a model of others; built where these are in other tests."""


def test_the_files_are_found():
    assert {"base", "quickstart", "digits_masked", "text_block", "text_uniform", "text_ar"} <= set(
        NAMES
    )


STUDY = {name for name in NAMES if name.startswith(("study.", "benchmarks."))}
"""Tasks for the network of ``base``; one is trained by default in test_study.py."""
BUILT = {*NAMES} - NEEDS_DATA


# A quickstart of characters is the base without any change.
@pytest.mark.parametrize("name", slow_except(BUILT - STUDY - {"base"}, sorted(BUILT)))
def test_a_config_builds_and_one_step_keeps_the_state(name):
    """A layer of the full model over the data of the smoke variant, where there is one."""
    config = _get_config(name)
    decoder = config.partition.decoder_depth if config.process == "partition" else 0
    config.model.depth = 1 + decoder
    if _has_variants(name):
        config.data = _get_config(name, "smoke").data
    _take_a_step(config)


def _take_a_step(config):
    experiment = make_experiment(config)
    state = experiment.abstract_state()
    after, metrics = jax.eval_shape(experiment.step, state, _batch(experiment))
    _assert_same_shapes(state, after)
    assert all(leaf.shape == () for leaf in metrics)
    assert experiment.describe()


def _batch(experiment):
    rows, length = experiment.config.train.batch_size, experiment.dataset.length
    return Batch(
        tokens=jax.ShapeDtypeStruct((rows, length), jnp.int32),
        eligible=jax.ShapeDtypeStruct((rows, length), jnp.bool_),
        documents=jax.ShapeDtypeStruct((rows, length), jnp.int32),
        units=jax.ShapeDtypeStruct((rows,), jnp.int32),
    )


def _assert_same_shapes(state, after):
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after)):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)


def _draw_and_learn(config):
    """The part of a step that knows of noise, on outputs of zero; the network takes longest."""
    experiment = make_experiment(config)
    pictures = config.process == "gaussian"
    transform, spec = experiment.transform, experiment.spec
    vocab = experiment.dataset.vocab_size

    def learn(state, batch):
        draw = variance.draw_batch(jax.random.key(0), transform, state, spec)
        stats = experiment.objective.loss(
            lambda inputs, *_: jnp.zeros(inputs.shape if pictures else (*inputs.shape, vocab)),
            batch,
            draw,
        )
        assert stats.raw.shape == draw.u.shape
        return transform.update(state, draw, stats)

    state = jax.eval_shape(lambda: transform.init(spec))
    _assert_same_shapes(state, jax.eval_shape(learn, state, _batch(experiment)))
    assert experiment.family.levels_from and experiment.bias()
    return experiment


REGISTERED = {
    "corruption.name": names.CORRUPTIONS,
    "law.name": names.LAWS,
    "weighting.name": names.WEIGHTINGS,
    "variance.order": names.VARIANCE,
    "optimizer.name": names.OPTIMIZERS,
    "optimizer.first_moment_dtype": {"int8": None},  # others: test_compiled_loop.py
    "model.dtype": names.DTYPES,
    "train.monitors": names.MONITORS,
    "clip_search.criterion": names.CLIP_CRITERIA,
    "task.name": names.TASKS,
    "sample.sampler": names.SAMPLERS | names.UNIFORM_SAMPLERS,
    "sample.grid": {"": None, "uniform_masking_rate": None, **names.LAWS},
}


MORE_LAWS = {*[*names.LAWS][2:]} | {*[*names.GAUSSIAN_LAWS][2:]}
"""Built by name in tests/laws/test_schedules_zoo.py, too."""
QUICKSTARTS = {"muon", "float32"}
"""Names that the quickstart has itself, whose own test takes the same step."""


@pytest.mark.parametrize(
    "field, name",
    [
        pytest.param(field, name, marks=[pytest.mark.slow] * (name in QUICKSTARTS | MORE_LAWS))
        for field, table in REGISTERED.items()
        for name in table
    ],
)
def test_every_registered_name_can_be_chosen(field, name):
    config = _get_config(
        "text_uniform" if name in names.UNIFORM_SAMPLERS else "quickstart", "smoke"
    )
    section, key = field.split(".")
    if section != "task":
        config[section][key] = (name,) if key in ("order", "monitors") else name
    else:
        config.data = launch_config.get_config().data
        config.data.source = "task"
        config.data.task.name = name
        config.data.task.update(train_rows=64, valid_rows=16, test_rows=16)
    if section == "clip_search":
        config.variance.order = ("clipped_adaptive",)
    if name in ("ppots_parametric", "ppots_unweighted"):
        config.variance[name].parameters = (0.5, 2.0, 0.6, 1.5, 3.0, 1.2, 2.0)
    if name == "entropy_rise":
        config.weighting.entropy_rise.bits = (0.5, 1.0, 2.5)
    if name == "rao_blackwell_clipped":
        config.law.name = "clipped"  # of the same rates
    if field == "sample.grid":
        config.sample.sampler = "ancestral"
    if section in ("sample", "task", "clip_search", "train"):
        make_experiment(config)
    elif section in ("optimizer", "model"):
        _take_a_step(config)
    else:
        _draw_and_learn(config)


def test_every_table_of_names_is_walked():
    """Data sources need data (tests/unit/data); Gaussian samplers: test_launch_gaussian.py."""
    walked = [*REGISTERED.values(), *GAUSSIAN.values(), names.GAUSSIAN_SAMPLERS, names.DATA]
    walked = {name for table in walked for name in table}
    tables = {k: v for k, v in vars(names).items() if k.isupper() and isinstance(v, dict)}
    tables.pop("METHODS")  # of the mode variance: test_variance_mode.py
    assert len(tables) >= 19
    for table in tables.values():
        assert set(table) <= walked


GAUSSIAN = {
    "recipe": names.RECIPES,
    "law": names.GAUSSIAN_LAWS,
    "modifiers": names.GAUSSIAN_MODIFIERS,
    "weighting": names.GAUSSIAN_WEIGHTINGS,
    "output": names.OUTPUTS,
    "path": names.PATHS,
}


@pytest.mark.parametrize(
    "field, name",
    [
        pytest.param(f, name, marks=[pytest.mark.slow] * (f == "law" and name in MORE_LAWS))
        for f, table in GAUSSIAN.items()
        for name in table
    ],
)
def test_every_part_of_a_gaussian_run_can_be_chosen(field, name):
    config = _get_config("digits_gaussian", "smoke")
    config.gaussian[field] = (name,) if field == "modifiers" else name
    if name == "zero_terminal":
        config.gaussian.output = "v"  # the noise says nothing of the data at pure noise
    shown = _draw_and_learn(config).family.levels_from
    assert name in shown


@pytest.mark.parametrize(
    "name",
    slow_except(
        {*names.GAUSSIAN_GRIDS, *names.GAUSSIAN_LAWS} - MORE_LAWS,
        [*names.GAUSSIAN_GRIDS, *names.GAUSSIAN_LAWS],
    ),
)
def test_every_gaussian_grid_can_be_chosen(name):
    config = _get_config("digits_gaussian", "smoke")
    recipe = gaussian_recipe(config.gaussian)
    levels = gaussian_levels(name, 4, config.gaussian, recipe.law)
    assert levels.shape == (5,) and levels[-1] == np.inf and np.all(np.diff(levels) > 0)
    assert levels[0] >= config.gaussian.low


def test_clipped_weights_without_a_law_of_their_rates_are_refused():
    config = _get_config("quickstart", "smoke")
    config.corruption.name = "rao_blackwell_clipped"
    with pytest.raises(ValueError, match="rates from 0.001 to 1 .* law.name='clipped'"):
        make_experiment(config)


def test_a_baseline_of_the_loss_wants_an_exact_chain():
    config = _get_config("quickstart", "smoke")
    config.train.monitors = ("levels", "baseline")
    assert [m.name for m in make_experiment(config).monitors] == ["levels", "baseline"]
    config.variance.order = ("stratified", "clipped")
    with pytest.raises(
        ValueError, match="clipped.* is truncated; leave the monitor 'baseline' out"
    ):
        make_experiment(config)


@pytest.mark.parametrize("name", [name for name in NAMES if _has_variants(name)])
def test_smoke_variants_are_small_and_unknown_ones_are_refused(name):
    config = _get_config(name, "smoke")
    assert config.train.steps <= 50 and (config.model.width <= 32 or name in FROM_SOURCE)
    with pytest.raises(ValueError, match=f"{name} has the variant.* not 'smokee'"):
        _get_config(name, "smokee")


def test_presets_of_text_share_their_data_and_count_characters():
    """In subwords, whose rows hold every character of a split once."""
    presets = [
        _get_config(name)
        for name in ("quickstart", "text_ar", "text_block", "text_partition", "text_uniform")
    ]
    assert all(config.data == presets[0].data for config in presets)
    assert all(config.train.steps == presets[0].train.steps for config in presets)
    dataset = datasets.dataset(presets[0])
    assert dataset.tokenizer.kind == "bpe"
    for name, rows in (("valid", dataset.valid), ("test", dataset.test)):
        whole = data.gather(rows, np.arange(len(rows)))
        assert whole.units.sum() == dataset.report[f"{name}_characters"]
        assert whole.eligible.sum() == dataset.report[f"{name}_tokens"]
    assert _get_config("quickstart", "char") == _get_config("base")


@pytest.mark.parametrize("name", NAMES)
def test_a_config_comes_back_from_its_workdir(name, tmp_path):
    """Through JSON and back: the same values of the same types, tuples included."""
    config = _get_config(name)
    workdir.claim(tmp_path, config)
    assert workdir.saved_config(tmp_path).to_dict() == scaled.filled(config).to_dict()


def test_settings_newer_than_a_run_have_their_defaults(tmp_path):
    config = _get_config("base")
    config.train.steps = 7
    config = scaled.filled(config)
    workdir.claim(tmp_path, config)
    saved = workdir.read_config(tmp_path)
    del saved["train"]["profile_at"], saved["mesh"]
    workdir.write_json(tmp_path / "config.json", saved)
    found = workdir.saved_config(tmp_path)
    assert found.train.steps == 7 and found.to_dict() == config.to_dict()
    workdir.check(tmp_path, found)
    found.train.profile_at = 3  # no longer the default
    with pytest.raises(workdir.WorkdirError, match="train.profile_at: 0 -> 3"):
        workdir.check(tmp_path, found)


def test_settings_that_no_release_of_ours_has_are_refused(tmp_path):
    config = _get_config("base")
    workdir.claim(tmp_path, config)
    saved = workdir.read_config(tmp_path)
    saved["train"]["batchsize"] = 3
    workdir.write_json(tmp_path / "config.json", saved)
    with pytest.raises(workdir.WorkdirError, match="train.batchsize is no .* train.batch_size"):
        workdir.read_config(tmp_path)
    config.train.batchsize = 3
    with pytest.raises(ValueError, match="train.batchsize is no .* train.batch_size"):
        launch_config.check_config(config)


@pytest.mark.parametrize(
    "name, bias", [("bernoulli_shifted_logit", "exact"), ("bernoulli_shifted_rate", "biased")]
)
def test_token_dependent_masking_learns_the_rare_tokens_from_the_data(name, bias):
    config = _get_config("quickstart", "smoke")
    config.corruption.name = name
    assert make_experiment(config).bias() == bias
