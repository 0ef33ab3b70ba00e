"""Settings that follow from others: by rule where unset, as given where set, as stored on."""

import json

import optax
import pytest

from mdm_jax.launch import config as launch_config
from mdm_jax.launch import names, presets
from mdm_jax.launch.build import make_experiment
from mdm_jax.launch.start import scaled
from mdm_jax.launch.start.optimizer import learning_rate, optimizer
from mdm_jax.launch.workdir import WorkdirError, changes, check, claim, read_config, resolved


def _run(steps=500, name="muon", **given):
    config = presets.text_uniform()
    config.train.steps, config.optimizer.name = steps, name
    config.optimizer.update(given)
    return config


def _numbers(config):
    return tuple(config.optimizer[name] for name in scaled.SCALED)


@pytest.mark.parametrize(
    "steps, name, expected",
    [
        (500, "muon", (0.02, 50, 0.99)),  # what the small text presets have always had
        (500, "adamw", (0.002, 50, 0.99)),
        (2000, "muon", (0.02, 200, 0.9975)),
        (20, "muon", (0.02, 2, 0.9)),
        (10**6, "adamw", (0.002, 1000, 0.9999)),
        (1, "adamw", (0.002, 0, 0.9)),
    ],
)
def test_unset_settings_follow_steps_and_optimizer(steps, name, expected):
    assert _numbers(scaled.filled(_run(steps, name))) == expected


def test_updates_of_one_step_share_its_learning_rate(monkeypatch):
    """The schedule ends with the last step, however many updates a step makes."""
    config, used = scaled.filled(_run()), []
    config.alignment.inner_steps = 3
    keep = lambda schedule, **_: used.append(schedule) or optax.identity()  # noqa: E731
    monkeypatch.setitem(names.OPTIMIZERS, "muon", keep)
    optimizer(config)
    expected = learning_rate(config)
    for update in (0, 2, 3, 150, 1499):
        assert used[0](update) == expected(update // 3)


def test_given_settings_win_and_the_config_given_is_not_touched():
    config = _run(2000, "adamw", peak=0.5, warmup_steps=0)
    assert _numbers(scaled.filled(config)) == (0.5, 0, 0.9975)
    assert _numbers(config) == (0.5, 0, None)


def test_a_run_that_goes_on_keeps_what_it_stored():
    """Such as AdamW at Muon's peak, the default when the run was started."""
    old = resolved(_run(2000, "adamw", peak=0.02, warmup_steps=50, ema_decay=0.99))
    assert _numbers(scaled.filled(_run(2000, "adamw"), old)) == (0.02, 50, 0.99)
    assert _numbers(scaled.filled(_run(4000, "adamw"), old)) == (0.02, 50, 0.99)
    new = resolved(scaled.filled(_run(2000, "muon")))  # by rule, and so by rule again
    assert _numbers(scaled.filled(_run(4000, "adamw"), new)) == (0.002, 400, 0.99875)


@pytest.mark.parametrize("every", [250, 0])
def test_a_run_that_goes_on_keeps_its_validations(tmp_path, every):
    """250 steps were the default of older releases, 0 is none."""
    old = scaled.filled(_run(2000))
    old.train.evaluate_every = every
    claim(tmp_path, old)
    check(tmp_path, _run(2000))
    longer = scaled.filled(_run(4000), read_config(tmp_path))
    assert longer.train.evaluate_every == every
    assert changes(tmp_path, longer) == ["train.steps: 2000 -> 4000"]
    other = _run(2000)
    other.train.evaluate_every = 100
    assert changes(tmp_path, other) == [f"train.evaluate_every: {every} -> 100"]


def test_an_experiment_has_numbers_and_says_them(one_device):
    config = presets.quickstart("smoke")
    config.train.steps, config.optimizer.warmup_steps = 40, None
    experiment = make_experiment(config)
    assert _numbers(experiment.config) == (0.02, 4, 0.9)
    said = scaled.describe(experiment.config)
    assert "muon, learning rate 0.02 after 4 of 40 steps" in said and "0.9 a step" in said


def test_the_directory_holds_numbers_and_unset_settings_are_no_change(tmp_path):
    claim(tmp_path, _run(2000))
    stored = read_config(tmp_path)["optimizer"]
    assert [stored[name] for name in scaled.SCALED] == [0.02, 200, 0.9975]
    check(tmp_path, _run(2000))
    check(tmp_path, scaled.filled(_run(2000)))
    with pytest.raises(WorkdirError, match="optimizer.warmup_steps: 200 -> 199"):
        check(tmp_path, _run(2000, warmup_steps=199))
    # Of another optimiser the peak follows; its name is the change.
    assert changes(tmp_path, scaled.filled(_run(2000, "adamw"))) == [
        'optimizer.name: "muon" -> "adamw"'
    ]


def test_lengths_fitted_to_pairs_are_stored_and_unset_ones_are_no_change(tmp_path, one_device):
    path = tmp_path / "pairs.jsonl"
    lines = [{"prompt": f"{i:03}" + "p" * (i % 5), "answer": f"{i}"} for i in range(200)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = presets.quickstart("smoke")
    config.data = launch_config.get_config().data
    config.data.update(source="jsonl", path=str(path))
    fitted = make_experiment(config).config
    assert (fitted.data.prompt_length, fitted.data.answer_length) == (7, 4)
    assert config.data.prompt_length == 0
    claim(tmp_path / "run", fitted)
    check(tmp_path / "run", config)
    again = scaled.filled(config, read_config(tmp_path / "run"))
    assert again.data.answer_length == 4 and not changes(tmp_path / "run", again)
    config.data.answer_length = 9
    assert changes(tmp_path / "run", config) == ["data.answer_length: 4 -> 9"]


@pytest.mark.parametrize(
    ("rows", "length", "parameters", "platform", "parts"),
    [
        (32, 256, 800_000, "cpu", 8),  # shape S
        (32, 256, 800_000, "gpu", 1),
        (16, 128, 20_000_000, "cpu", 1),  # shape M: a pass over its gradients costs more
        (8, 32, 10_000, "cpu", 1),
        (6, 1024, 10_000, "cpu", 6),
        (16, 128, 1_100_000, "cpu", 2),  # the quickstart
        (16, 256, 3_300_000, "cpu", 4),  # shapes V and W
        (7, 1024, 10_000, "cpu", 7),
        (11, 512, 10_000, "cpu", 1),  # 11 rows in at most 5 parts
        (2, 8192, 10_000, "cpu", 2),
    ],
)
def test_microbatches_fit_a_cpu_s_cache(rows, length, parameters, platform, parts):
    assert scaled.num_microbatches(rows, length, parameters, platform) == parts


def test_microbatches_are_those_of_the_rule_unless_given():
    config = presets.quickstart("smoke")
    config.data.length, config.train.batch_size = 256, 64
    assert make_experiment(config).num_microbatches == 16
    config.variance.order = ("mirror",)  # two views of each row
    assert make_experiment(config).num_microbatches == 32
    config.train.num_microbatches = 4
    assert make_experiment(config).num_microbatches == 4
    config.train.num_microbatches = 1  # the default when an old run was started
    old = resolved(scaled.filled(config))
    config.train.num_microbatches = None
    assert scaled.filled(config, old).train.num_microbatches == 1


def test_rules_say_what_is_done():
    """Words of the settings' listing, of the constants that the functions read."""
    assert scaled.RULES["peak"] == "adamw 0.002, muon 0.02"
    assert scaled.RULES["warmup_steps"] == "train.steps / 10, up to 1000"
    assert (scaled.warmup_steps(990), scaled.warmup_steps(10**6)) == (99, 1000)
    assert scaled.RULES["ema_decay"] == "1 - 5 / train.steps" and scaled.ema_decay(500) == 0.99
    known = launch_config.flat_settings()
    for path in ("optimizer.peak", "optimizer.warmup_steps", "optimizer.ema_decay"):
        assert scaled.RULES[path.split(".")[1]] in known[path].rule.explained()


def test_the_curve_that_ppots_had_by_default_is_no_change(tmp_path):
    config = _run()
    config.variance.ppots_parametric.parameters = (0.5, 2.0, 0.6, 1.5, 3.0, 1.2, 2.0)
    claim(tmp_path, config)
    assert changes(tmp_path, _run()) == []
    config.variance.ppots_parametric.parameters = (1.0,) * 7
    (line,) = changes(tmp_path, config)
    assert line.startswith("variance.ppots_parametric.parameters: [0.5, 2.0,")
