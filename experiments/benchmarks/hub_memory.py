r"""Memory per device of a released model, forward pass and training step, by the compiler.

pip install --no-deps --target LIB libtpu==0.0.42.1     # the version that jax 0.10.2 asks for
PYTHONPATH=.:LIB python -m experiments.benchmarks.hub_memory \
    --model=llada-8b --target=v5e:8x8 --fsdp=64 --rows=64

compiles for TPUs that need not be there; ``--target=cpu`` takes the devices of this process. The
training step is that of the launcher: masked bound, AdamW, average of the parameters, gradients and
moments in the dtype of the parameters, products in bfloat16, layers scanned and rematerialised.
The programs ``adapters`` and ``merged`` train low-rank adapters at all projections beside frozen
bfloat16 parameters: as the launcher does, and with kernels W + s A B made inside the step.
Nothing is run, and nothing is allocated. Compiling 8B takes minutes on one core.

With ``--timed_steps``, for devices that are there, training steps are timed in turns:

python -m experiments.benchmarks.hub_memory --model=qwen3-63m --target=cpu --fsdp=1 --rows=4 \
    --row_length=256 --programs=train,adapters,merged --timed_steps=10
"""

import dataclasses
import json
import math
import os
import pathlib
import time
from typing import Any

from absl import app, flags

_MODEL = flags.DEFINE_string("model", "qwen3-0.6b", "A name of MODELS, or a path of a config.json.")
_TARGET = flags.DEFINE_string("target", "v5e:2x4", "Topology of libtpu, such as v5p:2x2x2; or cpu.")
_DATA = flags.DEFINE_integer("data", 1, "Size of the mesh axis data.", lower_bound=1)
_FSDP = flags.DEFINE_integer("fsdp", 8, "Size of the mesh axis fsdp.", lower_bound=1)
_TENSOR = flags.DEFINE_integer("tensor", 1, "Size of the mesh axis tensor.", lower_bound=1)
_ROWS = flags.DEFINE_integer("rows", 8, "Rows of all devices.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("row_length", 1024, "Tokens of a row.", lower_bound=1)
_PARAM_DTYPES = flags.DEFINE_list("param_dtypes", ["float32", "bfloat16"], "Of training steps.")
_STEPS = flags.DEFINE_list("programs", ["forward", "train"], "What to compile.")
_RANK = flags.DEFINE_integer("rank", 16, "Of adapters.", lower_bound=1)
_REMAT = flags.DEFINE_string("remat", "full", "Rematerialisation of the training step.")
_TIMED = flags.DEFINE_integer("timed_steps", 0, "Steps of each program that are timed; 0: none.")

_QWEN = {"rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "num_key_value_heads": 8}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _QWEN | {
        "architectures": ["A2DQwen3LMHeadModel"], "vocab_size": 151936, "hidden_size": 1024,
        "num_hidden_layers": 28, "num_attention_heads": 16, "head_dim": 128,
        "intermediate_size": 3072, "tie_word_embeddings": True, "mask_token_id": 151669,
    },
    "qwen3-63m": _QWEN | {
        "architectures": ["A2DQwen3LMHeadModel"], "vocab_size": 32768, "hidden_size": 768,
        "num_hidden_layers": 6, "num_attention_heads": 12, "num_key_value_heads": 4,
        "head_dim": 64, "intermediate_size": 2048, "tie_word_embeddings": True,
        "mask_token_id": 32767,
    },
    "dream-7b": _QWEN | {
        "architectures": ["DreamModel"], "vocab_size": 152064, "hidden_size": 3584,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "tie_word_embeddings": False, "mask_token_id": 151666,
    },
    "llada-8b": {
        "architectures": ["LLaDAModelLM"], "vocab_size": 126464, "embedding_size": 126464,
        "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288,
        "rms_norm_eps": 1e-5, "rope": True, "rope_theta": 500000.0, "weight_tying": False,
        "activation_type": "silu", "block_type": "llama", "layer_norm_type": "rms",
        "mask_token_id": 126336,
    },
}  # fmt: skip
"""Fields of config.json that fix the shapes of released models; ``qwen3-63m`` is one of none."""


def devices(target: str):
    """Devices of a topology, described by the compiler's library; or this process's."""
    import jax
    from jax.experimental import topologies

    if target == "cpu":
        return jax.devices()
    found = topologies.get_topology_desc(target, platform="tpu").devices
    # What chooses attention and chunks of the loss asks for the backend that it will run on.
    jax.default_backend = lambda: "tpu"
    return found


def build(
    raw: dict[str, Any],
    mesh: Any,
    rows: int,
    length: int,
    param_dtype: str,
    remat: str,
    rank: int = 16,
):
    """Programs by name, to be lowered with their abstract arguments: (function, arguments)."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from mdm_jax import corruption, models, objectives, sharding, training, variance
    from mdm_jax.hub.family import find_family
    from mdm_jax.hub.model import FAMILIES
    from mdm_jax.models import lora
    from mdm_jax.types import Batch

    family = find_family(raw, "config.json", FAMILIES)
    config, traits = family.read_config(raw)

    def network(remat: str, param_dtype: str):
        settings = {"scan_layers": True, "dtype": jnp.bfloat16, "remat": remat}
        return family.model(
            dataclasses.replace(config, param_dtype=jnp.dtype(param_dtype), **settings)
        )

    module = network(remat, param_dtype)
    init = training.linen_init(module, length)
    by_rows = sharding.batch_sharding(mesh)

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=by_rows)

    tokens = array((rows, length), jnp.int32)
    task = objectives.masked_nelbo(corruption.fixed_count(traits.mask_id))
    chain = variance.chain(variance.stratified())
    moments, spec = (jnp.dtype(param_dtype),) * 2, task.spec(rows, length)
    optimizer = training.store_moments(training.adamw(lambda _: 1e-5), *moments)
    chunking = models.Chunking(mesh.shape["data"] * mesh.shape["fsdp"])
    apply_fn = models.readout_apply(module, chunking)
    apply_fn = models.shifted_apply(apply_fn) if traits.shift else apply_fn
    apply_fn = sharding.sharded_apply(apply_fn, mesh, sharding.LOGICAL_RULES)
    step = training.make_train_step(apply_fn, task, chain, optimizer, spec, seed=0)
    ema_dtype = jnp.dtype(param_dtype)

    def new_state():
        return training.new_state(
            init(jax.random.key(0)), optimizer, chain, spec, ema_dtype=ema_dtype
        )

    state = sharding.abstract_sharded(new_state, mesh)
    batch = Batch(tokens, array((rows, length), jnp.bool_), tokens, array((rows,), jnp.int32))
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    inference = network("none", param_dtype)

    def forward(params: Any, tokens: Any) -> Any:
        """The most likely tokens: a step of decoding without a cache."""
        outputs = family.outputs(inference, params, traits, tokens, None)
        return jnp.argmax(outputs.logits(), axis=-1)

    forward = sharding.sharded_apply(forward, mesh, sharding.LOGICAL_RULES)
    whole = NamedSharding(mesh, PartitionSpec(sharding.ROW_AXES))
    adapters = lora.Lora(rank=rank)

    def adapted_state():
        params = init(jax.random.key(0))
        trained = lora.init(jax.random.key(0), params, adapters)
        return training.new_state(trained, training.adamw(lambda _: 1e-5), chain, spec)

    narrow = sharding.abstract_sharded(adapted_state, mesh)
    narrow_places = jax.tree.map(lambda leaf: leaf.sharding, narrow)

    def adapted(join: Any) -> tuple:
        def step(own: Any, batch: Batch, frozen: Any) -> tuple:
            options = {"seed": 0, "variables": lambda trained, *_: join(frozen, trained, adapters)}
            adamw = training.adamw(lambda _: 1e-5)
            made = training.make_train_step(apply_fn, task, chain, adamw, spec, **options)
            return made(own, batch)

        jitted = jax.jit(step, donate_argnums=0, out_shardings=(narrow_places, None))
        return jitted, (narrow, batch, state.params)

    return {
        "adapters": adapted(lora.join),
        "merged": adapted(lora.merge),
        "forward": (jax.jit(forward, out_shardings=whole), (state.params, tokens)),
        "train": (
            jax.jit(step, donate_argnums=0, out_shardings=(places, None)),
            (state, batch),
        ),
    }


def bytes_per_device(tree: Any) -> int:
    """Of abstract arrays with shardings."""
    import jax

    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def measure(function: Any, arguments: tuple) -> tuple[dict[str, float], Any]:
    """Bytes per device of a program's arguments and of what the compiler plans beside them.

    And the compiled program.
    """
    started = time.time()
    compiled = function.lower(*arguments).compile()
    plan = compiled.memory_analysis()
    state = arguments[0]
    frozen = arguments[2:]  # of adapters
    parts = {"parameters": bytes_per_device((getattr(state, "params", state), frozen))}
    parts["optimiser"] = bytes_per_device(getattr(state, "opt_state", ()))
    parts["average"] = bytes_per_device(getattr(state, "ema", ()))
    fresh = plan.output_size_in_bytes - plan.alias_size_in_bytes
    parts["temporaries"] = plan.temp_size_in_bytes
    parts["all"] = plan.argument_size_in_bytes + plan.temp_size_in_bytes + fresh
    return parts | {"seconds": time.time() - started}, compiled


def stepping(compiled: Any, arguments: tuple) -> Any:
    """A call that takes a step of a compiled training program, from where the last one ended."""
    import jax
    import jax.numpy as jnp

    def fill(leaf: Any) -> Any:  # moments are positive, tokens of document 1 and eligible
        value = 0.01 if jnp.issubdtype(leaf.dtype, jnp.floating) else 1
        return jnp.full(leaf.shape, value, leaf.dtype, device=leaf.sharding)

    state, *others = jax.tree.map(fill, arguments)
    held = [state]

    def call() -> None:
        held[0], metrics = compiled(held[0], *others)
        jax.block_until_ready(metrics)

    call()
    return call


def main(_: list[str]) -> None:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import numpy as np

    from experiments.benchmarks.command import interleaved
    from mdm_jax import sharding

    if _MODEL.value in MODELS:
        raw = MODELS[_MODEL.value]
    elif pathlib.Path(_MODEL.value).is_file():
        raw = json.loads(pathlib.Path(_MODEL.value).read_text("utf-8"))
    else:
        raise app.UsageError(f"--model: give one of {', '.join(MODELS)} or a path of a config.json")
    sizes = (_DATA.value, _FSDP.value, _TENSOR.value)
    found = devices(_TARGET.value)
    if len(found) != math.prod(sizes):
        raise app.UsageError(
            f"--target={_TARGET.value} has {len(found)} devices, the mesh asks for {sizes}"
        )
    kinds = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.sharding.Mesh(np.array(found).reshape(sizes), sharding.AXES, axis_types=kinds)
    print(
        f"{_MODEL.value} on {_TARGET.value}, data {sizes[0]} x fsdp {sizes[1]} x tensor {sizes[2]}"
        f", {_ROWS.value} rows of {_LENGTH.value} tokens; GB (1e9 bytes) per device\n"
    )
    names = ("parameters", "optimiser", "average", "temporaries", "all")
    print("| program | param_dtype |", " | ".join(names), "| compiled in |")
    print("| --- | --- |" + " ---: |" * (len(names) + 1))
    calls = {}
    for program in _STEPS.value:
        for dtype in _PARAM_DTYPES.value if program == "train" else ["bfloat16"]:
            options = (dtype, _REMAT.value, _RANK.value)
            programs = build(raw, mesh, _ROWS.value, _LENGTH.value, *options)
            parts, compiled = measure(*programs[program])
            if _TIMED.value and program != "forward":
                calls[program, dtype] = stepping(compiled, programs[program][1])
            figures = [f"{parts[name] / 1e9:.2f}" for name in names]
            print(f"| {program} | {dtype} |", " | ".join(figures), end="")
            print(f" | {parts['seconds']:.0f} s |", flush=True)
    if calls:
        print("\n| program | param_dtype | step, s (quartiles) |\n| --- | --- | ---: |")
    for (program, dtype), times in interleaved(calls, rounds=_TIMED.value, seconds=0.0).items():
        low, median, high = np.quantile(times, (0.25, 0.5, 0.75))
        print(f"| {program} | {dtype} | {median:.3f} ({low:.3f}-{high:.3f}) |")


if __name__ == "__main__":
    app.run(main)
