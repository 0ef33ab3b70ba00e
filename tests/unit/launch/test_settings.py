"""Every setting states what it may be beside its default, and nothing else becomes a run."""

import inspect
import math
import pathlib

import jax
import numpy as np
import pytest

from mdm_jax import checks, hub, models, samplers, training
from mdm_jax.launch import build, config, names, presets, source
from mdm_jax.launch.start import scaled

SETTINGS = config.flat_settings()
TABLES = (
    *(names.VARIANCE, names.CORRUPTIONS, names.LAWS, names.WEIGHTINGS, names.SAMPLERS),
    *(names.UNIFORM_SAMPLERS, names.GAUSSIAN_SAMPLERS, names.GAUSSIAN_LAWS, names.RECIPES),
    *(names.GAUSSIAN_MODIFIERS, names.GAUSSIAN_WEIGHTINGS),
    *(names.DATA, names.TASKS, names.OPTIMIZERS, names.MONITORS),
)
FACTORIES = [
    *(factory for table in TABLES for factory in table.values()),
    *(models.TransformerConfig, training.LoopOptions, training.warmup_cosine),
    training.make_train_step,
    *(config.MeasureSettings, samplers.temperature, samplers.top_k, samplers.top_p),
]


def _outside(rule):
    """Values that a rule must refuse: beyond its ends, not finite, huge, of other types."""
    if isinstance(rule, checks.Name):
        return ["nope", "", 3, None] if "" not in rule.names else ["nope", 3, None]
    if isinstance(rule, checks.Plain):
        return [3, 0.5, None, math.nan]
    low, high = rule.ends
    values = [math.nan, math.inf, -math.inf, 2**62, -(2**62), 1e30, -1e30, "1", None, True, [[1]]]
    step = 1 if isinstance(rule, checks.Whole) else 1e-3 * (high - low)
    values += [low - step, high + step, -1, 0]
    values += [low] * (rule.interval[0] == "(") + [high] * (rule.interval[-1] == ")")
    values += [low + 0.5] * isinstance(rule, checks.Whole)
    number = [type(v) in (int, float) for v in values]
    return [v for v, n in zip(values, number) if not (n and _allows(rule, v))]


def _allows(rule, value):
    """By the definition of an interval, not by the rule's own code."""
    low, high = (float(end) for end in rule.interval[1:-1].split(","))
    whole = value == math.floor(value) if math.isfinite(value) else False
    return (
        math.isfinite(value)
        and (value > low or (value == low and rule.interval[0] == "["))
        and (value < high or (value == high and rule.interval[-1] == "]"))
        and (whole or not isinstance(rule, checks.Whole))
    )


def _in_place(values, default):
    """A value where the setting holds one, or inside the tuple that it holds."""
    return [(value, *default[1:]) if isinstance(default, tuple) else value for value in values]


def test_every_setting_states_what_it_may_be():
    for name, (default, rule) in SETTINGS.items():
        assert rule is not None, name
        if default is not None:
            rule.check(name, default)
        if isinstance(rule, checks.Real):
            low, high = rule.ends
            assert low < high and rule.interval[0] in "[(" and rule.interval[-1] in "])", name
            assert rule.unit or rule.meaning, name
            for end, inside in ((low, rule.interval[0] == "["), (high, rule.interval[-1] == "]")):
                if inside:
                    rule.check(name, int(end) if isinstance(rule, checks.Whole) else end)


MEANINGLESS = {
    "optimizer.peak": (-0.01, 0.0),
    "optimizer.weight_decay": (-50.0,),
    "optimizer.b1": (2.0, 1.0),
    "optimizer.b2": (1.0,),
    "optimizer.final_fraction": (-1.0,),
    "optimizer.muon.momentum": (2.0, 1.0),
    "optimizer.ema_decay": (1.0,),
    "model.mlp_ratio": (-1.0, 0.0),
    "model.rope_base": (0.0, 1.0),
    "sample.top_p": (2.0, 0.0),
    "sample.temperature": (-1.0,),
    "train.steps": (0,),
    "variance.ppots.floor": (0.0,),
}


def test_ranges_leave_out_what_has_no_meaning():
    """Ends of ranges, written down once more."""
    for name, values in MEANINGLESS.items():
        for value in values:
            with pytest.raises(ValueError, match=f"^{name} must be"):
                SETTINGS[name].rule.check(name, value)
    with pytest.raises(ValueError, match="mlp_ratio 0.01 of width 128 leaves no hidden units"):
        models.TransformerConfig(8, mlp_ratio=0.01)


def test_no_setting_outside_of_its_rule_becomes_a_run(monkeypatch):
    """Whatever the process reads: the config is checked before any data are touched."""
    monkeypatch.setattr(build, "dataset", lambda _: pytest.fail("got as far as the data"))
    run, refusals = presets.quickstart("smoke"), 0
    for name, (default, rule) in SETTINGS.items():
        *path, last = name.split(".")
        section = run
        for part in path:
            section = section[part]
        kept = section[last]
        wrong = _in_place(_outside(rule), default)
        wrong += [5] if isinstance(default, tuple) else [(default,)]
        for value in wrong:
            if default is None and (value is None or (value is True and type(rule) is checks.Real)):
                # A field without a value makes 1.0 of True, as any field of floats does when typed.
                continue
            with section.ignore_type():
                section[last] = value
            with pytest.raises((ValueError, TypeError), match=rf"^{name}(:| must)"):
                build.make_experiment(run)
                pytest.fail(f"{name}={value!r} was accepted")
            refusals += 1
        with section.ignore_type():
            section[last] = kept
    assert refusals > 2000
    config.check_config(run)


def _cases():
    for factory in FACTORIES:
        for name, parameter in inspect.signature(factory).parameters.items():
            rule = checks.rule_of(parameter)
            if isinstance(rule, checks.Real | checks.Name):
                yield factory, name, rule, parameter


def test_constructors_hold_to_the_same_rules():
    """Also for own loops, which build no config."""
    cases = list(_cases())
    for factory, name, rule, parameter in cases:
        optional = type(None) in getattr(parameter.annotation, "__args__", ())
        for value in _outside(rule):
            if value is None and optional:
                continue
            value = (value,) if rule.several else value
            with pytest.raises((ValueError, TypeError), match=rf": {name}(:| must)"):
                factory(**{name: value})
                pytest.fail(f"{factory}: {name}={value!r} was accepted")
    assert len(cases) > 140


def test_numbers_of_factories_all_have_a_rule():
    for factory in FACTORIES:
        for name, parameter in inspect.signature(factory).parameters.items():
            number = type(parameter.default) in (int, float) and math.isfinite(parameter.default)
            if number and name not in (*config.LOOP_OWN, "split_seed"):
                assert checks.rule_of(parameter) is not None, (factory, name)


@pytest.mark.parametrize(
    "value, message",
    [
        (-0.01, r"rate: step must be a number in \(0, 1\], got -0.01 \(per step, of the walk\)"),
        (0.0, r"in \(0, 1\], got 0.0"),
        (math.nan, "got nan"),
        (np.float32(1.5), "got 1.5"),
        (10**400, "must be a number in"),
    ],
)
def test_messages_say_what_is_allowed_and_what_was_given(value, message):
    @checks.checked
    def rate(step: checks.Annotated[float, checks.Real("(0, 1]", "per step", "of the walk")]):
        return step

    with pytest.raises(ValueError, match=message):
        rate(value)
    assert rate(1) == 1
    assert jax.jit(rate)(2.0) == 2.0  # not known while it is traced
    with pytest.raises(TypeError, match="unexpected keyword"):
        rate(pace=1)


def test_whole_numbers_of_any_integer_type_pass():
    @checks.checked
    def rows(count: checks.Annotated[int, checks.Whole("[1, 8]", "rows")] | None = None):
        return count

    assert rows(np.int64(3)) == rows(3) and rows() is None
    for wrong in (2.0, np.float32(2.0), True, "2"):
        with pytest.raises((ValueError, TypeError), match="rows: count must be"):
            rows(wrong)


# --- names that the process does not read, and settings of demonstrations -------------------------


@pytest.fixture
def run(one_device):
    return presets.quickstart("smoke")


def test_a_grid_of_another_process_is_refused_though_the_sampler_has_none(run):
    run.sample.grid = "edm"
    with pytest.raises(ValueError, match="sample.grid: unknown name 'edm'; .*uniform_masking_rate"):
        build.make_experiment(run)


def test_a_judge_that_is_no_run_is_refused_though_nothing_is_judged(run, tmp_path):
    run.sample.judge = str(tmp_path / "nothing")
    with pytest.raises(RuntimeError, match="sample.judge: .*nothing holds no run"):
        build.make_experiment(run)


def test_a_gap_longer_than_the_passage_is_halved_with_a_line_that_says_so(run):
    run.sample.gap = run.data.length + 1
    experiment = build.make_experiment(run)
    (job,) = (job for job in experiment.jobs if job.kind == "infilled")
    assert np.sum(job.canvas == experiment.dataset.mask_id) == run.data.length // 2
    assert "sample.gap=33 is longer than the infilled passage; its middle 16 tokens" in (
        experiment.describe()
    )
    run.sample.gap = run.data.length
    assert "sample.gap" not in build.make_experiment(run).describe()


@pytest.mark.parametrize("name", ["finetune", "finetune_pairs", "convert"])
def test_a_preset_that_begins_from_a_model_asks_for_it(name):
    with pytest.raises(ValueError, match=r"--config.model.source=DIR\): no such directory; name"):
        source.read(presets.get_config(name))


def test_rows_longer_than_the_model_states_are_warned_of():
    model = hub.describe(pathlib.Path(__file__).parents[2] / "data" / "hub" / "a2d_qwen3-1")
    length = model.traits.length
    (line,) = source.describe(model, length + 1, None, None)
    assert f"rows of {length + 1} tokens, of which config.json of the model states" in line
    assert source.describe(model, length, None, None) == source.describe(None, 9, None, None) == []


@pytest.mark.parametrize("steps, every, expected", [(500, None, 50), (4, None, 1), (500, 7, 7)])
def test_a_run_is_validated_ten_times_unless_told_otherwise(steps, every, expected):
    settings = config.get_config()
    settings.train.update(steps=steps, evaluate_every=every)
    config.check_config(settings)
    assert scaled.evaluate_every(settings) == expected
    assert config.get_config().train.evaluate_every is None
    settings.train.evaluate_every = 0
    assert scaled.evaluate_every(settings) == 0
