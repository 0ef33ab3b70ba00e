"""The benchmarks: a fair yardstick, honest arithmetic, and no package that a GPU machine lacks."""

import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from absl import flags
from absl.testing import flagsaver

from experiments.benchmarks import (
    command,
    gpu,
    hub_load,
    input_pipeline,
    machine,
    peers,
    pods,
    sampling,
    setting,
    soak,
    text_speed,
    train_step,
    variance_probe,
    yardstick,
)
from mdm_jax import draws, hub, objectives, training

TINY = setting.Shape("tiny", 8, 11, 16, 1, 2, 4, 8, False)
QUICK = command.Options(("default",), rounds=1, seconds=0.0)


@pytest.fixture(scope="module")
def tiny_network():
    network = setting.model(TINY, setting.PLAIN)
    params = tiny.jit(lambda: setting.random_params(network, TINY.length))()
    return network, tiny.perturbed(params, scale=0.2)


def test_the_yardstick_computes_the_loss_and_the_gradient_of_the_library(tiny_network):
    network, params = tiny_network
    task, batch = setting.objective(TINY), setting.batch(TINY)
    draw = draws.iid(jax.random.key(0), task.spec(TINY.batch_size, TINY.length))

    def library(params):
        stats = task.loss(lambda *inputs: network.apply(params, *inputs), batch, draw)
        sums = objectives.sum_losses(draw, stats)
        return objectives.token_mean(sums.loss, sums.eligible)

    def plain(params):
        rate = jax.nn.sigmoid(-task.law.icdf(draw.u[0, :, 0]))
        return yardstick.loss(
            params, batch.tokens, rate, draw.noise[0], TINY.mask_id, TINY.num_heads
        )

    expected = tiny.jit(jax.value_and_grad(library))(params)
    with jax.numpy_rank_promotion("allow"):  # it is written as a script would be
        found = tiny.jit(jax.value_and_grad(plain))(params)
    assert float(expected[0]) > 1.0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), found, expected
    )


@pytest.mark.slow
def test_every_variant_of_the_step_has_the_yardsticks_parameters_and_loss():
    """One step of each, from the same parameters and noise; only dtypes may make a difference."""
    losses, counts = {}, {}
    variants = {name: setting.TRAIN[name] for name in ("dense", "library bfloat16")}
    variants["two microbatches"] = setting.TRAIN["library float32"]._replace(num_microbatches=2)
    for name, variant in variants.items():
        step, state, batch = setting.train_step(TINY, variant)
        counts[name] = training.num_params(state.params)
        losses[name] = float(tiny.jit(step)(state, batch)[1].loss)
    assert len(set(counts.values())) == 1
    embedding, norms = TINY.vocab_size * TINY.width, (2 * TINY.depth + 1) * TINY.width
    assert counts["dense"] == setting.matmul_params(TINY) + embedding + norms
    for name in variants:
        assert losses[name] == pytest.approx(losses["dense"], rel=1e-2 if "bf" in name else 1e-5)


def test_model_flops_are_those_of_the_products_in_the_program(tiny_network):
    network, params = tiny_network
    tokens = jnp.zeros((TINY.batch_size, TINY.length), jnp.int32)
    program = jax.make_jaxpr(lambda p, x: yardstick.logits(p, x, TINY.num_heads))
    with jax.numpy_rank_promotion("allow"):
        found = program(params, tokens)
    total = 0
    for equation in found.jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            summed = equation.params["dimension_numbers"][0][0]
            inner = np.prod([equation.invars[0].aval.shape[i] for i in summed])
            total += 2 * inner * np.prod(equation.outvars[0].aval.shape)
    assert total == setting.forward_flops(TINY, TINY.batch_size, TINY.length)
    assert setting.train_flops(TINY) == 3 * total


def test_the_yardstick_samples_what_is_masked_and_nothing_else(tiny_network):
    _, params = tiny_network
    canvas = jnp.full((2, 8), TINY.mask_id).at[:, 3].set(5)
    with jax.numpy_rank_promotion("allow"):
        tokens = yardstick.make_sampler(TINY.mask_id, TINY.num_heads, 3)(
            params, jax.random.key(0), canvas
        )
    assert (tokens[:, 3] == 5).all() and not (tokens == TINY.mask_id).any()


def test_rounds_take_turns_and_go_on_until_the_time_is_spent():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    times = command.interleaved(calls, rounds=2, seconds=0.0)
    rounds = [called[:3], called[3:]]
    assert all(sorted(order) == list("abc") for order in rounds)
    assert [len(t) for t in times.values()] == [2, 2, 2]
    called.clear()
    ticks = iter(range(100_000))
    times = command.interleaved(calls, rounds=1, seconds=0.01, clock=lambda: next(ticks))
    rounds = [tuple(called[i : i + 3]) for i in range(0, len(called), 3)]
    assert len(rounds) > 6 and len(set(rounds)) == 6  # every order occurs
    assert set(times["a"]) == {1}  # by the clock that was given


def test_medians_and_ratios_of_rounds():
    found = command.summary([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (found["lower_quartile"], found["median"], found["upper_quartile"]) == (2.0, 3.0, 4.0)
    assert found["least"] == 1.0 and found["count"] == 5
    assert command.ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])["median"] == 2.0


def test_variants_are_chosen_by_name_or_set_in_the_order_of_the_table():
    chosen = command.choose(setting.TRAIN, ("no chain", "default"), setting.TRAIN_SETS)
    assert list(chosen) == [n for n in setting.TRAIN if n in setting.TRAIN_SETS["default"]]
    with pytest.raises(ValueError, match=r"unknown 'dens'; known are yardstick, .*sets default"):
        command.choose(setting.TRAIN, ("dens",), setting.TRAIN_SETS)


def test_every_named_set_and_chain_exists():
    for table, sets in (
        (setting.TRAIN, setting.TRAIN_SETS),
        (sampling.GENERATORS, sampling.SETS),
        (variance_probe.CHAINS, variance_probe.SETS),
    ):
        assert {name for names in sets.values() for name in names} <= set(table)
    for variant in setting.TRAIN.values():
        assert setting.chain(variant).bias == "exact"


def test_what_cannot_be_measured_is_reported_and_the_rest_is_measured(monkeypatch):
    table = {
        "dense": setting.PLAIN,
        "from elsewhere": setting.Variant("", {"attention": "not there"}),
        "unknown field": setting.Variant("", {"no_such_field": 1}),
    }
    monkeypatch.setattr(train_step, "TRAIN", table)
    monkeypatch.setattr(train_step, "TRAIN_SETS", {"default": tuple(table)})
    monkeypatch.setattr(machine, "product", lambda dtype: (lambda: None, 1e6))
    found = train_step.measure(TINY, QUICK)
    kept = found["variants"]
    assert kept["dense"]["seconds"]["median"] > 0 and kept["dense"]["memory_bytes"]["peak"] > 0
    assert "attention: unknown name 'not there'" in kept["from elsewhere"]["unavailable"]
    assert kept["unknown field"]["unavailable"].startswith("TypeError:")
    lines = train_step.table(found)
    assert any("unknown field: not measured, TypeError" in line for line in lines)
    json.dumps(found, allow_nan=False)


@pytest.mark.slow
def test_sampling_and_its_table(monkeypatch):
    monkeypatch.setattr(sampling, "SETS", {"default": ("ancestral", "blocks, cached")})
    found = sampling.measure(TINY, QUICK, num_steps=2)
    assert set(found["generators"]) == {"ancestral", "blocks, cached"}
    assert not any("unavailable" in figures for figures in found["generators"].values())
    assert found["block_size"] == TINY.sample_length
    assert len(sampling.table(found)) == 6
    json.dumps(found, allow_nan=False)


@pytest.mark.slow
def test_the_probe_sees_less_variance_where_there_is_less(monkeypatch):
    monkeypatch.setattr(variance_probe, "_CALLS_ALONE", 2)
    options = command.Options(("stratified",), rounds=24, seconds=0.0)
    found = variance_probe.measure(TINY, options)
    chains = found["chains"]
    assert found["redraws"] == 24 and list(chains) == ["independent", "stratified"]
    assert chains["independent"]["variance_over_independent"] == 1.0
    assert 0 < chains["stratified"]["variance_over_independent"] < 1.0
    assert len(variance_probe.table(found)) == 6


@pytest.mark.slow
def test_the_pipeline_feeds_steps_and_says_how_long_they_waited(monkeypatch):
    monkeypatch.setattr(input_pipeline, "_ROWS", 64)
    monkeypatch.setattr(input_pipeline, "_PULLS", 3)
    found = input_pipeline.measure(TINY._replace(batch_size=8), QUICK)
    assert found["fill"] > 0.8 and found["rows_per_second_alone"] > 0
    assert list(found["steps"]) == ["no pipeline", "prefetched", "pulled by the step"]
    assert all(0 <= step["wait_share"] < 1 for step in found["steps"].values())
    assert found["steps"]["no pipeline"]["wait_seconds"]["count"] == 3
    assert len(input_pipeline.table(found)) == 7


_LACKING = """
import sys

class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {lacking}:
            raise ModuleNotFoundError("No module named " + name, name=name)

sys.meta_path.insert(0, Lacking())
import importlib.util
found = importlib.util.find_spec
def find_spec(name, package=None):
    return None if name in {lacking} else found(name, package)
importlib.util.find_spec = find_spec
from experiments.benchmarks import command, input_pipeline, setting
from experiments.benchmarks import sampling, train_step, variance_probe
setting.chain(setting.CHOSEN)
print(input_pipeline.measure(setting.SHAPES["S"], command.Options()))
"""


@pytest.mark.slow
def test_steps_are_measured_where_only_the_small_stack_is_installed():
    lacking = {"tqdm", "tensorboardX", "matplotlib", "grain", "ml_collections", "tokenizers"}
    lacking |= {"tensorflow_datasets", "array_record", "clu"}
    program = _LACKING.replace("{lacking}", repr(lacking))
    command_line = [sys.executable, "-c", program]
    done = subprocess.run(command_line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "unavailable" in done.stdout


SMALL = hub_load.CONFIG | {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "mask_token_id": 63,
}


def test_the_made_model_has_the_tensors_of_its_config(tmp_path):
    hub_load.make(tmp_path, SMALL, "bfloat16")
    model = hub.load(tmp_path)
    assert model.params["params"]["block_1"]["mlp"]["up"]["kernel"].shape == (32, 48)


@pytest.mark.slow
def test_the_command_for_a_gpu_runs_to_its_end_at_sizes_for_a_cpu():
    lines = []
    records = gpu.measure(small=True, show=lines.append)
    generators = records["generation"]["generators"]
    assert [g["same_tokens"] for g in generators.values()] == [1.0, 1.0]
    assert records["training"]["variants"]["library"]["mfu"]["median"] > 0
    tuned = records["tuning"]["tuned"]
    for name in ("all", "adapters"):
        assert tuned[name]["memory_bytes"] > 0 and tuned[name]["rows_per_second"]["median"] > 0
    assert "step of tiny, attention cudnn" in lines[-1]  # and why it was not measured
    assert lines[-1].splitlines()[0].endswith("goal |") and "45%" in lines[-1]


@pytest.mark.slow
def test_a_run_that_is_killed_twice_is_the_run_that_is_not(tmp_path):
    """SIGKILL to processes of two: the same bits in the end."""
    found = soak.soak(tmp_path, processes=2, kills=2, steps=32, width=16, seed=0)
    assert len(found["kills"]) == 2 and found["steps"] == 32
    assert found["saving_seconds_per_step"] > 0
    with pytest.raises(ValueError, match="give the same settings to go on"):
        soak.soak(tmp_path, processes=2, kills=2, steps=34, width=16, seed=0)


@pytest.mark.slow
def test_a_row_of_the_table_of_pods(tmp_path, monkeypatch):
    case = pods.Case("tiny", "cpu:2", {"data": 1, "fsdp": 2}, 4, remat="none")
    monkeypatch.setitem(pods.CASES, "tiny", case)
    pods.compile_case("tiny", tmp_path)
    monkeypatch.setitem(pods.CASES, "tiny", case._replace(topology="v5e:2x1"))  # figures of a chip
    cells = [cell.strip() for cell in pods.row("tiny", "now", tmp_path).strip("|").split("|")]
    assert len(cells) == len(pods.HEADER)
    assert cells[:4] == ["tiny", "v5e:2x1, fsdp 2", "4, adamw, none", "now"]
    assert cells[8].endswith("%") and float(cells[10]) > 0


def test_speed_at_equal_quality_lies_between_step_counts():
    def record(run, steps, nats, speed):
        return {"run": run, "steps": steps, "nats": nats, "tokens_per_second": speed}

    records = [record("a", 8, 5.0, 400.0), record("a", 32, 4.0, 100.0)]
    records += [record("b", 8, 4.5, 900.0), record("b", 32, 3.5, 100.0)]
    records += [record("c", 8, 3.9, 50.0), record("d", 32, 4.1, 70.0)]
    found = {each["run"]: each for each in text_speed.at_equal_quality(records)}
    assert {each["nats"] for each in found.values()} == {4.0}
    assert found["a"]["speed"] == pytest.approx(100.0)
    assert found["b"]["speed"] == pytest.approx(300.0)  # halfway, in the logarithm
    assert found["c"] == {"run": "c", "nats": 4.0, "speed": 50.0, "at_least": True}
    assert found["d"]["speed"] is None


FAKE_WORKER = """
import json, sys
job = json.loads(sys.argv[1])
seconds = {"library": 2.0, "launcher": 2.2, "mdlm": 4.0}[job["side"]]
if job["side"] == "launcher" and job["shape"]["name"] == "broken":
    sys.exit("nothing to run on")
print(json.dumps({"calls": ["step"], "parameters": 7, "first": {"step": 3.0}, "seconds": 9.0}))
sys.stdout.flush()
for line in sys.stdin:
    assert line == "step\\n"
    print(json.dumps({"seconds": seconds, "value": 2.5, "peak_mib": 1.0}), flush=True)
"""


@pytest.fixture
def peer(tmp_path, monkeypatch):
    """``peers`` with a checkout of mdlm and workers that say what their steps took."""
    (tmp_path / "diffusion.py").touch()
    (tmp_path / "peers_worker.py").write_text(FAKE_WORKER)
    monkeypatch.setattr(peers, "__file__", str(tmp_path / "peers.py"))
    with flagsaver.flagsaver(mdlm=str(tmp_path), bd3lms=None):
        flags.FLAGS.mark_as_parsed()
        yield peers


def test_peers_are_compared_in_the_seconds_that_their_workers_tell(peer):
    sides = {name: peers.TRAIN[name] for name in ("library", "launcher", "mdlm", "bd3lms")}
    sides["mdlm compiled"] = sides["mdlm"]
    shape = TINY._replace(name="S")
    found = peers.measure("training", sides, shape, QUICK._replace(rounds=3))
    measured = {n: r for n, r in found["sides"].items() if "unavailable" not in r}
    over = {name: r["over_library"]["median"] for name, r in measured.items()}
    assert over == pytest.approx({"library": 1, "launcher": 1.1, "mdlm": 2, "mdlm compiled": 2})
    assert found["sides"]["launcher"]["seconds"]["count"] == 3
    lines = peers.table(found)
    assert any("bd3lms: not measured, ValueError: --bd3lms: no checkout" in line for line in lines)
    assert lines[-2].startswith("library / mdlm compiled: 0.50 (0.50-0.50), goal 0.8: met")
    assert lines[-1].startswith("launcher / library: 1.10 (1.10-1.10), goal 1.05: not met")


def test_a_worker_that_ends_says_why(peer):
    sides = {name: peers.TRAIN[name] for name in ("library", "launcher")}
    found = peers.measure("training", sides, TINY._replace(name="broken"), QUICK)
    message = found["sides"]["launcher"]["unavailable"]
    assert message == "RuntimeError: status 1: nothing to run on"
    assert found["sides"]["library"]["seconds"]["median"] == 2.0


def test_children_do_not_outlive_a_benchmark_that_is_terminated():
    with pytest.raises(SystemExit), peers.ending_children():
        child = peers.start(["sleep", "60"])
        os.kill(os.getpid(), signal.SIGTERM)
        child.wait()
    assert child.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_our_sides_of_the_comparison_with_peers_step_and_sample(monkeypatch):
    with flagsaver.flagsaver(mdlm=None, bd3lms=None):
        flags.FLAGS.mark_as_parsed()
        sides = {name: peers.TRAIN[name] for name in ("library", "launcher", "yardstick", "mdlm")}
        found = peers.measure("training", sides, TINY, QUICK)["sides"]
        assert "no checkout" in found.pop("mdlm")["unavailable"]
        assert found["yardstick"]["parameters"] == found["library"]["parameters"]
        assert all(2 < r["last_value"] < 3 for r in found.values())  # log 10 = 2.3
        monkeypatch.setattr(peers, "STEPS", 2)
        found = peers.measure("sampling", peers.SAMPLE, TINY, QUICK)
        names = {"ancestral", "blocks, cached", "mdlm", "bd3lms"}
        assert set(found["sides"]) == names | {f"{name} bfloat16" for name in names}
