"""The real loop: one trace, and neither compilations nor transfers between logs; its memory."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import launching
import numpy as np
import optax
import pytest
import tiny
from jax.experimental.compilation_cache import compilation_cache

from mdm_jax import training
from mdm_jax.launch import command_line, presets
from mdm_jax.launch.build import make_experiment
from mdm_jax.launch.modes import train as launch_train
from mdm_jax.training import loop

LOG_EVERY, STEPS = 4, 12


class Watch:
    """Compilations and fetches from the device while the loop is between two logging steps."""

    def __init__(self):
        self.between = False
        self.compiled, self.fetched, self.logged = [], [], []


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run of the launcher's own training under guard: (watch, experiment, compiled step)."""
    config = presets.quickstart("smoke")
    config.model.width, config.model.depth, config.data.length = 16, 1, 16
    config.optimizer.update(name="adamw", peak=0.01)
    config.train.update(
        steps=STEPS, log_every=LOG_EVERY, evaluate_every=0, checkpoint_every=0, batch_size=16
    )
    config.mesh.update(data=2, fsdp=2, tensor=2)
    experiment, watch, steps = make_experiment(config), Watch(), []
    compile_step, train = training.compile_step, training.train
    write, value = loop._Log.write, jax._src.array.ArrayImpl._value

    def guarded(step, *arguments, **more):
        def call(state, batch):
            found = step(state, batch)
            watch.between = len(steps) > LOG_EVERY
            steps.append(0)
            return found

        with jax.transfer_guard("disallow"):
            return train(call, *arguments, **more)

    def quiet_write(self, *arguments, **more):
        watch.between = False
        return write(self, *arguments, **more)

    def record(self):
        (watch.fetched if watch.between else watch.logged).append(len(steps))
        return value.fget(self)

    def compiling(name, _seconds, **_):
        if watch.between and "backend_compile" in name:
            watch.compiled.append(len(steps))

    kept = []
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        chex.clear_trace_counter()
        patch.setitem(experiment.__dict__, "step", chex.assert_max_traces(experiment.step, n=1))
        patch.setattr(
            training, "compile_step", lambda *a: kept.append(compile_step(*a)) or kept[-1]
        )
        patch.setattr(training, "train", guarded)
        patch.setattr(loop._Log, "write", quiet_write)
        patch.setattr(jax._src.array.ArrayImpl, "_value", property(record))
        jax.monitoring.register_event_duration_secs_listener(compiling)
        stack.callback(jax.monitoring.unregister_event_duration_listener, compiling)
        assert launch_train.train(experiment, tmp_path_factory.mktemp("loop") / "run")
    assert len(steps) == STEPS
    return watch, experiment, kept[0]


def zeros(experiment):
    """A state with zeros in the places of the experiment's own."""
    return jax.tree.map(
        lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding),
        experiment.abstract_state(),
    )


def test_one_trace_no_compilation_and_no_fetch_between_logs(watched):
    watch, _, _ = watched
    assert watch.compiled == [] and watch.fetched == []
    assert {LOG_EVERY, 2 * LOG_EVERY, STEPS} <= set(watch.logged)  # fetches are seen where they are


def test_the_compiled_step_refuses_what_it_was_not_compiled_for(watched):
    _, experiment, compiled = watched
    state = zeros(experiment)
    with contextlib.closing(experiment.train_batches()) as batches:
        batch = next(batches)
    with pytest.raises((TypeError, ValueError)):
        compiled.call(state, jax.tree.map(lambda leaf: leaf[:8], batch))


def test_the_compiler_says_what_the_step_needs(watched):
    """At least the state on one of eight devices."""
    _, experiment, compiled = watched
    shards = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(zeros(experiment))]
    assert sum(shards) < compiled.memory_bytes < 20 * sum(shards)
    assert "compiled in" in compiled.describe() and "per device" in compiled.describe()


def test_the_compiled_step_takes_the_buffers_of_its_state():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shape = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=place)
    compiled = training.compile_step(lambda state, batch: (state + batch, None), shape, shape)
    state, batch = (jax.device_put(np.ones(2, np.float32), place) for _ in range(2))
    new, _ = compiled.call(state, batch)
    assert state.is_deleted() and not batch.is_deleted() and new.tolist() == [2, 2]


def test_a_step_that_does_not_fit_is_refused_with_advice(monkeypatch):
    def exhausted(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 99 GiB")

    monkeypatch.setattr(jax.stages.Lowered, "compile", exhausted)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shape = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=place)
    with pytest.raises(MemoryError, match=r"train\.num_microbatches.*99 GiB"):
        training.compile_step(lambda state, batch: (state + batch, None), shape, shape)


def test_sizes_are_readable():
    sizes = {10: "10 B", 2048: "2.0 KiB", 3 * 2**20: "3.0 MiB", 5 * 2**30: "5.0 GiB"}
    assert {size: training.format_bytes(size) for size in sizes} == sizes


# --- the cache ----------------------------------------------------------------------------------


@pytest.fixture
def own_cache(tmp_path):
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    jax.config.update(names[0], None)
    jax.config.update(names[1], 0.0)
    jax.config.update(names[2], -1)
    yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_second_start_finds_the_step_in_the_cache(own_cache):
    hits = []

    def count(name, **_):
        hits.append(name)

    spec, step = tiny.step_fn(8, optax.adam(0.01))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state, batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        (tiny.new_state(spec, optax.adam(0.01)), tiny.batch(8)),
    )
    assert command_line.use_compilation_cache(str(own_cache)) == own_cache
    jax.monitoring.register_event_listener(count)
    try:
        training.compile_step(step, state, batch)
        assert any(own_cache.iterdir())
        assert "/jax/compilation_cache/cache_hits" not in hits
        _, anew = tiny.step_fn(8, optax.adam(0.01))  # which the caches in memory do not know
        again = training.compile_step(anew, state, batch)
    finally:
        jax.monitoring.unregister_event_listener(count)
    assert "/jax/compilation_cache/cache_hits" in hits
    new, _ = again.call(
        jax.device_put(tiny.new_state(spec, optax.adam(0.01)), place),
        jax.device_put(tiny.batch(8), place),
    )
    assert int(new.step) == 1


def test_where_the_cache_lies(own_cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_cache))
    jax.config.update("jax_compilation_cache_dir", None)
    assert command_line.use_compilation_cache("") is None
    assert jax.config.jax_compilation_cache_dir is None
    assert command_line.use_compilation_cache(None) == own_cache / "mdm_jax" / "compiled"
    jax.config.update(
        "jax_compilation_cache_dir", str(own_cache / "own")
    )  # as from the environment
    assert command_line.use_compilation_cache(None) == own_cache / "own"


def test_programs_of_a_hundredth_of_a_second_are_kept(own_cache, monkeypatch):
    limit = "jax_persistent_cache_min_compile_time_secs"
    monkeypatch.delenv(limit.upper(), raising=False)
    for before, after in ((0.0, 0.0), (1.0, 0.01)):
        jax.config.update(limit, before)
        command_line.use_compilation_cache(str(own_cache))
        assert getattr(jax.config, limit) == after
    monkeypatch.setenv(limit.upper(), "2")
    jax.config.update(limit, 2.0)
    command_line.use_compilation_cache(str(own_cache))
    assert getattr(jax.config, limit) == 2.0


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text,message",
    [
        ("data=2;fsdp=4", "a mesh is written as --config.mesh=data=2,fsdp=4"),
        ("data=two", "a mesh is written as"),
        ("data=8,model=1", "did you mean|config.mesh has no field 'model'"),
        ("data=3", "does not use the 8 devices"),
        ("data=1,tensor=8", "2 attention heads do not split over tensor=8"),
    ],
)
def test_meshes_of_one_line_that_do_not_fit(tmp_path, monkeypatch, capsys, text, message):
    workdir = tmp_path / "run"
    code, _, err = launching.call(
        monkeypatch,
        capsys,
        f"--config={launching.QUICKSTART}",
        f"--workdir={workdir}",
        f"--config.mesh={text}",
    )
    assert code == 2 and not workdir.exists()
    assert any(part in err for part in message.split("|")), err


def test_a_mesh_in_one_line():
    from mdm_jax.launch.command_line import _expand

    assert _expand(["x", "--config.mesh=data=-1, fsdp=4,tensor=2", "--a"]) == [
        "x",
        "--config.mesh.data=-1",
        "--config.mesh.fsdp=4",
        "--config.mesh.tensor=2",
        "--a",
    ]


# --- storage in less memory -----------------------------------------------------------------------


def test_averages_as_offsets_follow_where_stored_averages_stand_still():
    """Decay 0.999, parameters that move by 1 in 400 steps: roundings add up to 2% of the lag."""
    rng = np.random.default_rng(0)
    path = 1 + np.cumsum(rng.normal(0.0025, 0.01, (400, 64)), 0)
    params = [{"w": jnp.asarray(p, jnp.float32)} for p in path]
    exact = training.new_average(params[0])
    offset = training.new_average(params[0], jnp.bfloat16)
    plain = params[0]["w"].astype(jnp.bfloat16)
    move = jax.jit(training.update_average)
    for old, new in zip(params, params[1:]):
        exact = move(exact, old, new, 0.999)
        offset = move(offset, old, new, 0.999)
        plain = (plain + 0.001 * (new["w"] - plain.astype(jnp.float32))).astype(jnp.bfloat16)
    assert jax.tree.leaves(offset)[0].dtype == jnp.bfloat16
    moved = np.abs(np.asarray(exact["w"]) - path[0])
    shown = params[-1]["w"] + offset.offset["w"].astype(jnp.float32)
    error = np.abs(np.asarray(shown - exact["w"]))
    lag = np.abs(np.asarray(params[-1]["w"] - exact["w"]))
    assert error.mean() < 0.02 * lag.mean() and error.mean() < 0.1 * moved.mean()
    stuck = np.abs(np.asarray(plain, np.float32) - np.asarray(exact["w"]))
    assert stuck.mean() > 0.5 * moved.mean()


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_moments_in_bfloat16_cost_little(name):
    """Forty steps on a quadratic: the loss differs by under 2%; states are half as large."""
    rng = np.random.default_rng(1)
    target = jnp.asarray(rng.normal(size=(16, 16)), jnp.float32)
    inputs = jnp.asarray(rng.normal(size=(64, 16)), jnp.float32)

    def loss(params, noise):
        error = (inputs + noise) @ (params["kernel"] - target)
        return jnp.mean(jnp.square(error))

    def end(**stored):
        rate = {"adamw": 0.05, "muon": 0.2}[name]
        optimizer = getattr(training, name)(optax.constant_schedule(rate), b2=0.99)
        optimizer = training.store_moments(optimizer, b2=0.99, **stored)
        params = {"kernel": jnp.zeros((16, 16))}

        def step(carry, key):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(
                params, 0.3 * jax.random.normal(key, inputs.shape)
            )
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        keys = jax.random.split(jax.random.key(0), 40)
        (_, state), values = tiny.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), keys))(
            params
        )
        return (
            float(values[-5:].mean()),
            float(values[0]),
            sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        )

    exact, first, size = end()
    stored, _, small = end(first=jnp.bfloat16, second=jnp.bfloat16)
    assert exact < 0.6 * first
    assert abs(stored - exact) < 0.02 * exact
    assert small < 0.55 * size


def test_narrow_moments_are_rounded_once_a_step():
    """Two steps of Adam's first moment: float32 arithmetic on what is stored in bfloat16."""
    optimizer = training.store_moments(optax.adam(0.1), first=jnp.bfloat16)
    gradients = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)

    @jax.jit
    def both(gradients):
        state = optimizer.init(gradients[0])
        for gradient in gradients:
            _, state = optimizer.update(gradient, state)
        return optax.tree.get(state, "mu")

    stored = np.zeros(64, np.float32)
    for gradient in gradients:
        moved = np.float32(0.1) * gradient + np.float32(0.9) * stored
        stored = moved.astype(jnp.bfloat16).astype(np.float32)
    found = both(gradients)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.astype(np.float32), stored)


def test_second_moments_that_could_never_fall_are_refused():
    optimizer = optax.adam(0.1)
    with pytest.raises(ValueError, match="would round every decay away"):
        training.store_moments(optimizer, second=jnp.bfloat16, b2=0.999)
    training.store_moments(optimizer, b2=0.999)  # of float32


def test_a_step_keeps_the_dtypes_of_its_state_where_parameters_are_narrow():
    """As a compiled step must, which takes its own state."""
    for first, second in ((jnp.float32, jnp.float32), (jnp.bfloat16, jnp.float32)):
        optimizer = training.store_moments(training.adamw(lambda _: 0.1), first, second)
        spec, step = tiny.step_fn(4, optimizer)
        state = tiny.new_state(spec, optimizer)
        narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.params)
        state = training.new_state(narrow, optimizer, tiny.transform(), spec)
        after, _ = jax.eval_shape(step, state, tiny.batch(4))
        dtypes, found = (jax.tree.map(lambda leaf: leaf.dtype, each) for each in (state, after))
        assert dtypes == found
        for name, dtype in (("mu", first), ("nu", second)):
            assert all(m.dtype == dtype for m in jax.tree.leaves(optax.tree.get(state, name)))
    nu = jnp.bfloat16(1.0)
    assert (0.999 * nu.astype(jnp.float32)).astype(jnp.bfloat16) == nu  # what is refused
    assert (0.99 * nu.astype(jnp.float32)).astype(jnp.bfloat16) < nu


def test_a_run_with_everything_stored_small():
    config = presets.quickstart("smoke")
    config.optimizer.update(
        first_moment_dtype="bfloat16", second_moment_dtype="bfloat16", ema_dtype="bfloat16"
    )
    abstract = make_experiment(config).abstract_state()
    assert isinstance(abstract.ema, training.AverageOffset)
    assert training.averaged(abstract) is abstract.params
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.dtype
        for path, leaf in jax.tree_util.tree_flatten_with_path(abstract.opt_state)[0]
    }
    assert {d for n, d in names.items() if "/mu/" in n or "/nu/" in n} == {jnp.dtype("bfloat16")}
    config.optimizer.ema_dtype = "float8"
    with pytest.raises(ValueError, match=r"optimizer\.ema_dtype"):
        make_experiment(config).abstract_state()


def test_settings_of_the_compiler_are_known_to_it_and_can_be_replaced():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)
    lowered = jax.jit(lambda a: jnp.sum(jax.nn.softmax(a @ a, axis=-1), axis=0)).lower(x)
    tuned, plain = (lowered.compile(compiler_options=o) for o in (training.compiler_options(), {}))
    np.testing.assert_allclose(tuned(x), plain(x), rtol=1e-6)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shape = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=place)
    step = lambda state, batch: (state + batch, None)  # noqa: E731
    assert training.compile_step(step, shape, shape, options={}).seconds > 0
    with pytest.raises(Exception, match="No such compile option"):
        training.compile_step(step, shape, shape, options={"xla_no_such_setting": "1"})
