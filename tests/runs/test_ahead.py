"""``mdm compile``: plans of programs, of which the CPU's are those of what really runs."""

import importlib.util
import json
import math
import re
import types

import jax
import jax.numpy as jnp
import pytest

from mdm_jax import distributed, files, sharding, training
from mdm_jax.launch import presets
from mdm_jax.launch.ahead import collectives, command, plan, program, stand_in, targets
from mdm_jax.launch.build import make_experiment
from mdm_jax.launch.start.optimizer import recomputes_update
from mdm_jax.models import layers


def smoke(**mesh):
    config = presets.quickstart("smoke")
    config.mesh.update({"data": 1, "fsdp": 1, "tensor": 1} | mesh)
    return config


def eight_config():
    config = smoke(data=2, fsdp=4)
    config.optimizer.name = "adamw"  # compiles sooner, and so does a step without monitors
    config.train.monitors, config.model.depth = (), 1
    return config


@pytest.fixture(scope="module")
def eight():
    return plan.compile_plan(eight_config(), jax.devices())


@pytest.mark.slow  # compiles the step once more
def test_memory_is_that_of_the_step_that_runs(eight):
    experiment = make_experiment(eight_config())
    step = training.compile_step(
        experiment.step,
        experiment.abstract_state(),
        experiment.abstract_batch(),
        experiment.placed_seed(),
        options={},
    )
    assert eight.memory == step.memory_bytes
    state = experiment.initial_state()
    shards = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(state.params)]
    assert eight.state["params"] == sum(shard.nbytes for shard in shards)


def test_products_are_six_operations_per_weight_and_token(eight):
    """A training step's count by hand (Kaplan et al. 2020), plus attention's products."""
    config = eight_config()
    c, length = config.model, config.data.length
    weights = c.depth * (4 * c.width**2 + 2 * c.width * 4 * c.width)
    tokens = config.train.batch_size * length
    attention = 3 * c.depth * 2 * 2 * tokens * length * c.width
    least = (6 * weights * tokens + attention) / 8
    assert least <= eight.flops < 2.5 * least  # the head, and attention's recomputed products


def test_collectives_reduce_gradients_over_the_devices(eight):
    assert {one.group for one in eight.collectives} <= {1, 2, 4, 8}
    assert any(one.kind in ("all-reduce", "reduce-scatter") for one in eight.collectives)
    gradients = 4 * eight.parameters
    assert sum(one.bytes_sent for one in eight.collectives) > gradients / 8


def test_no_device_holds_whole_moments_or_the_logits_of_its_rows(eight):
    config, state = eight_config(), make_experiment(eight_config()).abstract_state()
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.opt_state))
    assert whole / 4 <= eight.state["opt_state"] < 1.1 * whole / 4
    vocabulary = state.params["params"]["embedding"].shape[0]
    wide = re.findall(rf"f32\[([\d,]+),{vocabulary}\]", eight.text)
    leading = [math.prod(map(int, dims.split(","))) for dims in wide]
    rows = config.train.batch_size // 8
    assert 0 < max(leading) < rows * config.data.length, leading


def test_the_draw_of_a_step_sends_nothing(eight):
    """So what it costs does not grow with the model."""
    draw = [line for line in eight.text.splitlines() if re.search('op_name="[^"]*/draw/', line)]
    kinds = "|".join(collectives.KINDS)
    assert draw and not [line for line in draw if re.search(rf" ({kinds})(-start)?\(", line)]


def test_command_prints_plans_and_writes_figures(tmp_path):
    lines, out = [], tmp_path / "plan.json"
    command.plan(smoke(data=-1), "cpu:2", names=("evaluate", "sample"), out=out, show=lines.append)
    text = "\n".join(lines)
    assert "evaluate:" in text and "sample:" in text and "mesh data 2, fsdp 1" in text
    record = json.loads(out.read_text())
    assert [made["program"] for made in record["plans"]] == ["evaluate", "sample"]
    assert all(made["memory"] > 0 and made["flops"] > 0 for made in record["plans"])
    with pytest.raises(ValueError, match="exists"):
        command.plan(smoke(), "cpu:1", out=out)


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5e", "v5e:2x4"),
        ("v9:2x2", "known chips are v4"),
        ("cpu:64", "device_count=64"),
    ],
)
def test_topologies_that_cannot_be(topology, message):
    with pytest.raises(ValueError, match=message):
        command.plan(smoke(), topology)


def test_mesh_must_fill_the_topology():
    with pytest.raises(ValueError, match="does not use the 2 devices"):
        command.plan(smoke(data=3), "cpu:2")


def test_unknown_programs_are_named():
    with pytest.raises(ValueError, match="unknown generate; known are train, evaluate, sample"):
        command.plan(smoke(), "cpu:1", names=("generate",))


def stubbed_plans(monkeypatch, memory):
    """``compile_plan`` of plans with ``memory(fsdp, remat)`` bytes, or an error; what it compiled.

    Recomputing takes longer, and so do fewer ways of fsdp."""
    compiled = []
    seconds = dict(zip((*command.REMATS, *command.OFFLOADING), (1, 2, 3, 4, 5, 3, 5), strict=True))

    def compile_plan(config, devices, program="train"):
        fsdp, remat = config.mesh.fsdp, config.model.remat
        compiled.append((fsdp, remat))
        if isinstance(needed := memory(fsdp, remat), Exception):
            raise needed
        return plan.Plan(
            program=program,
            mesh=config.mesh.to_dict(),
            rows=8,
            remat=remat,
            parameters=1,
            arguments=0,
            temporaries=0,
            memory=needed,
            state={},
            flops=197e12 * seconds[remat] / fsdp,
            traffic=1.0,
            collectives=(),
            largest=(),
            unknown_loops=0,
            compile_seconds=0.0,
            text="",
            host=remat.startswith("offload"),
        )

    monkeypatch.setattr(plan, "compile_plan", compile_plan)
    meshes = [{"data": 1, "fsdp": n, "tensor": 1} for n in (1, 2)]
    monkeypatch.setattr(plan, "meshes", lambda *_: iter(meshes))
    return compiled


def searched(budget=60.0):
    lines = []
    found = command._search(smoke(), jax.devices(), targets.CHIPS["v5e"], budget, lines.append)
    return found, lines


SIZES = dict(zip((*command.REMATS, *command.OFFLOADING), (15.5, 15, 14, 9, 8, 7, 6), strict=True))


def test_a_search_finds_the_first_policy_that_leaves_the_runtime_its_memory(monkeypatch):
    """A v5e has 16 GB: 15 fit the chip, but not the share of it that a plan may use."""

    def memory(fsdp, remat):
        if fsdp == 2:
            return ValueError("the compiler of tpu failed: a reason")
        return SIZES[remat] * 1e9

    compiled = stubbed_plans(monkeypatch, memory)
    found, lines = searched()
    assert [remat for fsdp, remat in compiled if fsdp == 1] == ["dots_without_batch", "dots"]
    assert {remat for fsdp, remat in compiled if fsdp == 2} >= {"full", *command.OFFLOADING}
    assert len(found) == 2 and "more than 92% of the memory" in lines[2]
    assert lines[-1].endswith("fsdp=1,tensor=1 --config.model.remat=dots_without_batch")
    assert any("a reason" in line for line in lines)
    _, lines = searched(budget=0.0)
    assert sum("stopped after" in line for line in lines) == 1
    assert "--config.model.remat=dots_without_batch" in lines[-1]
    with pytest.raises(ValueError, match="cpu:1 has none"):
        command.plan(smoke(), "cpu:1", search=True)


def test_a_search_tries_every_policy_within_four_plans_of_a_mesh(monkeypatch):
    """Whichever is the first that fits is found; offloading is the last resort."""
    assert {*command.REMATS, *command.OFFLOADING} == set(layers.POLICIES)
    for limit, first in enumerate(command.REMATS):
        fitting = command.REMATS[limit:]
        compiled = stubbed_plans(monkeypatch, lambda _, r, f=fitting: 1e9 if r in f else 20e9)
        _, lines = searched()
        assert lines[-1].endswith(f"fsdp=2,tensor=1 --config.model.remat={first}")
        assert len(compiled) <= 2 * 3
    compiled = stubbed_plans(monkeypatch, lambda _, r: 1e9 if r in command.OFFLOADING[1:] else 2e10)
    _, lines = searched()
    assert lines[-1].endswith("--config.model.remat=offload_inputs") and len(compiled) == 2 * 4
    # One mesh fits in its devices' memory, a faster one by offloading alone.
    late = {(1, "full"): 1e9, (2, "offload_dots"): 1e9}
    stubbed_plans(monkeypatch, lambda *choice: late.get(choice, 20e9))
    assert searched()[1][-1].endswith("fsdp=1,tensor=1 --config.model.remat=full")
    # Devices without the host's memory are not tried.
    monkeypatch.setitem(layers._HOST, "offload_dst", "nowhere")
    compiled = stubbed_plans(monkeypatch, lambda *_: 20e9)
    assert "nothing fits" in searched()[1][-1]
    assert not {remat for _, remat in compiled} & set(command.OFFLOADING)


SMALL = {
    "architectures": ["A2DQwen3LMHeadModel"],
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "mask_token_id": 60,
    "torch_dtype": "bfloat16",
}
"""A released model of which there is config.json alone."""


def finetuning(folder, **settings):
    files.write_json(folder / "config.json", SMALL)
    config = presets.finetune()
    config.model.update(source=str(folder), scan_layers=True, remat="full", dtype="bfloat16")
    config.data.length, config.train.batch_size = 16, 8
    config.mesh.update(data=1, fsdp=8)
    with config.unlocked():
        config.update_from_flattened_dict(settings)
    return config


def test_a_config_json_alone_is_enough_to_compile_from(tmp_path):
    """Neither weights nor data: rows are the model's tokens, as long as the config says."""
    config = finetuning(tmp_path, **{"adapter.name": "lora"})
    with stand_in.with_outline(config) as outlined:
        experiment = make_experiment(outlined, read=stand_in.dataset)
    assert experiment.abstract_batch().tokens.shape == (8, 16)
    assert (experiment.dataset.vocab_size, experiment.dataset.mask_id) == (64, 60)
    frozen = jax.tree.leaves(plan._parameters(experiment))
    assert {leaf.dtype.name for leaf in frozen} == {"bfloat16"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]
    pairs = finetuning(tmp_path, **{"data.source": "jsonl", "data.prompt_length": 6})
    pairs.data.answer_length = 5
    with stand_in.with_outline(pairs) as outlined:
        assert make_experiment(outlined, read=stand_in.dataset).dataset.length == 11
    pairs.data.update(prompt_length=0, answer_length=0)
    with stand_in.with_outline(pairs) as outlined, pytest.raises(ValueError, match="these are 0"):
        make_experiment(outlined, read=stand_in.dataset)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_memory_of_a_released_model_is_counted_by_its_shards(dtype, size, tmp_path):
    """Two moments and an average, all of them in the compiler's sum."""
    stored = ("optimizer.first_moment_dtype", "optimizer.second_moment_dtype")
    narrow = dict.fromkeys((*stored, "optimizer.ema_dtype", "model.param_dtype"), dtype)
    config = finetuning(tmp_path, **narrow)
    config.train.monitors = ()
    made = plan.compile_plan(config, jax.devices())
    embedding, block = 64 * 32, 32 * (2 * 32 + 2 * 16 + 3 * 48) + 2 * 32
    a_device = (embedding + 2 * block + 32) // 8 + 2 * 2 * 8  # norms of heads are whole
    assert made.state["params"] == made.state["ema"] == size * a_device
    assert 2 * size * a_device <= made.state["opt_state"] < 2 * size * a_device + 64
    # Beside it there are a batch and metrics: all of the state is donated, on CPUs too.
    state = sum(made.state.values())
    assert state < made.memory - made.temporaries < state + 4096


@pytest.mark.slow
def test_memory_of_adapters_is_that_of_frozen_parameters_and_of_theirs(tmp_path):
    settings = {"adapter.name": "lora", "adapter.rank": 8, "adapter.base_dtype": "bfloat16"}
    made = plan.compile_plan(finetuning(tmp_path, **settings), jax.devices()).state
    whole = plan.compile_plan(finetuning(tmp_path), jax.devices()).state
    assert 2 * made["frozen"] == whole["params"] and made["params"] == made["ema"] > 0
    assert 2 * made["ema"] <= made["opt_state"] < 2 * made["ema"] + 64


def test_meshes_divide_devices_heads_and_rows():
    found = list(plan.meshes(8, heads=4, rows=4))
    assert {"data": 8, "fsdp": 1, "tensor": 1} not in found  # 4 rows do not split in 8
    assert {"data": 4, "fsdp": 1, "tensor": 2} in found
    assert all(m["data"] * m["fsdp"] * m["tensor"] == 8 for m in found)
    assert all(4 % m["tensor"] == 0 for m in found) and len(found) == len({*map(str, found)})


def test_rows_that_fit_lie_on_a_line_through_two_plans(eight):
    import dataclasses

    small = dataclasses.replace(eight, rows=8, memory=100)
    large = dataclasses.replace(eight, rows=16, memory=140)  # 60 and 5 a row
    assert plan.rows_that_fit(small, large, 260) == 40
    assert plan.rows_that_fit(small, large, 59) == 0


def test_platform_is_the_mesh_s_inside_a_sharded_function():
    """Kernels and chunks are chosen for the devices of the mesh, not for those of this process."""
    seen = []
    mesh = jax.sharding.AbstractMesh(
        (1, 1, 1),
        sharding.AXES,
        abstract_device=jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "cuda"),
    )

    def apply(x):
        seen.append((distributed.platform(), distributed.compute_capability()))
        return x

    assert sharding.sharded_apply(apply, mesh, sharding.LOGICAL_RULES)(0) == apply(0)
    assert seen == [("gpu", "9.0"), ("cpu", "")]


@pytest.mark.parametrize(
    "name, moments", [("adamw", "int8"), ("adamw", "bfloat16"), ("muon", "int8")]
)
def test_updates_are_computed_twice_where_that_is_cheap_and_memory_is_dear(name, moments):
    config = smoke()
    config.optimizer.update(name=name, second_moment_dtype=moments)
    h100 = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "cuda")
    meshes = [
        jax.sharding.AbstractMesh((1, 1, 1), sharding.AXES, abstract_device=device)
        for device in (h100, None)
    ]
    found = [recomputes_update(config, types.SimpleNamespace(abstract_mesh=m)) for m in meshes]
    assert found == [name == "adamw" and moments == "int8", False]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu, the compiler for TPUs: pip install 'mdm_jax[tpu]'",
)
def test_a_small_pod_that_is_not_there():
    config = presets.quickstart("smoke")
    config.update({"mesh": {"data": 2, "fsdp": 2}})
    made = plan.compile_plan(config, targets.devices("v5e:2x2"))
    assert 0 < made.memory < 16e9 and made.collectives
    assert made.unknown_loops == 2  # over as many chunks as hold masked tokens, and back
    assert made.fits(targets.CHIPS["v5e"])


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu, the compiler for TPUs: pip install 'mdm_jax[tpu]'",
)
@pytest.mark.parametrize("as_training", [True, False])
def test_sums_of_a_dense_kernel_are_not_sent_to_all_of_64_chips(as_training):
    """The setting of training steps is needed, and does it; products of 1024 tokens a chip."""
    devices = targets.devices("v5e:8x8")
    mesh = sharding.make_mesh(data=1, fsdp=64, devices=devices)
    layer = layers.Linear(12288, ("embed", "mlp"), dtype=jnp.bfloat16)
    init = lambda: layer.init(jax.random.key(0), jnp.zeros((1, 8, 4096)))  # noqa: E731
    params = sharding.abstract_sharded(init, mesh)
    rows = sharding.batch_sharding(mesh)
    x = jax.ShapeDtypeStruct((64, 1024, 4096), "float32", sharding=rows)
    gradient = jax.grad(lambda params, x: jnp.sum(jnp.square(layer.apply(params, x))))
    gradient = sharding.sharded_apply(gradient, mesh, sharding.LOGICAL_RULES)
    places = jax.tree.map(lambda leaf: leaf.sharding, params)
    options = training.compiler_options("tpu") if as_training else {}
    assert options or not as_training
    lowered = jax.jit(gradient, out_shardings=places).lower(params, x)
    text = lowered.compile(compiler_options=options).as_text()
    sent = collectives.describe(collectives.find(program.Module(text, 64)))
    to_all = sent["all-reduce"].bytes_sent if "all-reduce" in sent else 0.0
    whole = 4 * 4096 * 12288
    assert (to_all < 0.01 * whole) == as_training, sent


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None or jax.config.jax_platforms != "cpu",
    reason="needs JAX_PLATFORMS=cpu and compilers for GPUs: pip install 'mdm_jax[gpu-compile]'",
)
def test_gpus_that_are_not_there():
    config = presets.quickstart("smoke")
    config.update({"mesh": {"data": 2, "fsdp": 2}})
    made = plan.compile_plan(config, targets.devices("h100:4"))
    assert 0 < made.memory < 80e9 and made.fits(targets.CHIPS["h100"])
    kinds = {one.kind for one in made.collectives}
    assert {"all-gather", "reduce-scatter"} <= kinds, kinds
    config.model.dtype = "bfloat16"  # for which "auto" is cuDNN's kernel
    if importlib.util.find_spec("nvidia.cudnn") is None:
        with pytest.raises(ValueError, match="config.model.attention=recompute"):
            plan.compile_plan(config, targets.devices("h100:4"))
