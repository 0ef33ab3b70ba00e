r"""Plans of large models on pods that are not there: memory, traffic and collectives of a step.

PYTHONPATH=.:LIBTPU JAX_PLATFORMS=cpu python -m experiments.benchmarks.pods \
    --checkouts=before=DIRECTORY,after=. --cases=1B-v5e

compiles the launcher's training step of every case in every checkout, reads all compiled programs
by the same ``mdm_jax.launch.ahead``, and prints a table. A case takes minutes to tens of minutes on
one core, most of it the compiler's; ``--keep=DIRECTORY`` keeps programs and figures, and what is
there already is not compiled again. Nothing is run.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

from absl import app, flags

_CASES = flags.DEFINE_list("cases", None, "Names of CASES; all by default.")
_CHECKOUTS = flags.DEFINE_list("checkouts", ["now=."], "NAME=DIRECTORY of commits to compile.")
_KEEP = flags.DEFINE_string("keep", None, "Where programs and figures are kept, and found again.")


class Case(NamedTuple):
    """A model on a machine. ``rows`` of 1024 tokens are those of all devices."""

    shape: str
    topology: str
    mesh: dict[str, int]
    rows: int
    optimizer: str = "adamw"
    remat: str = "full"


CASES = {
    "1B-v5e": Case("1B", "v5e:4x4", {"data": 1, "fsdp": 16}, 64),
    "8B-v5e": Case("8B", "v5e:8x8", {"data": 1, "fsdp": 64}, 64),
    "MoE-v5e": Case("MoE", "v5e:4x8", {"data": 1, "fsdp": 32}, 64),
    "1B-v5p": Case("1B", "v5p:2x2x4", {"data": 1, "fsdp": 16}, 64),
    "8B-v5p": Case("8B", "v5p:2x2x4", {"data": 1, "fsdp": 16}, 64),
    "MoE-v5p": Case("MoE", "v5p:2x2x4", {"data": 1, "fsdp": 16}, 64),
    "1B-h100": Case("1B", "h100:8", {"data": 2, "fsdp": 4}, 64),
    "8B-h100": Case("8B", "h100:8x8", {"data": 8, "fsdp": 8}, 64),
    "MoE-h100": Case("MoE", "h100:8", {"data": 1, "fsdp": 8}, 16),
    "muon": Case("Muon's update of 85M", "cpu:4", {"data": 1, "fsdp": 4}, 0, optimizer="muon"),
    "experts": Case("a layer of MoE", "cpu:8", {"data": 1, "fsdp": 8}, 16),
}
"""By name: 1B and LLaDA-8B are dense, MoE is LLaDA-MoE-7B-A1B (7B parameters, 1.4B per token)."""

_LLADA = {
    "architectures": ["LLaDAModelLM"], "n_heads": 16, "n_kv_heads": 16, "rms_norm_eps": 1e-5,
    "rope": True, "rope_theta": 500000.0, "weight_tying": False, "activation_type": "silu",
    "block_type": "llama", "layer_norm_type": "rms", "eos_token_id": 1, "mask_token_id": 2,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _LLADA | {
        "vocab_size": 512, "embedding_size": 512, "d_model": 64, "n_layers": 2, "n_heads": 4,
        "n_kv_heads": 4, "mlp_hidden_size": 192,
    },
    "1B": _LLADA | {
        "vocab_size": 32000, "embedding_size": 32000, "d_model": 2048, "n_layers": 18,
        "mlp_hidden_size": 5632,
    },
    "8B": _LLADA | {
        "vocab_size": 126464, "embedding_size": 126464, "d_model": 4096, "n_layers": 32,
        "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288,
    },
    "MoE": {
        "architectures": ["LLaDAMoEModelLM"], "vocab_size": 157184, "hidden_size": 2048,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16,
        "num_experts": 64, "num_experts_per_tok": 8, "expert_intermediate_size": 1024,
        "dense_intermediate_size": 8192, "moe_layer_freq": [1] * 16, "qk_layernorm": True,
        "rms_norm_eps": 1e-5, "rope_theta": 50000, "partial_rotary_factor": 1,
        "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False,
        "eos_token_id": 1, "mask_token_id": 2,
    },
}  # fmt: skip
"""Fields of config.json that fix a shape; token ids are those of :func:`write_source`."""


def write_source(shape: str, directory: pathlib.Path) -> pathlib.Path:
    """A source of a run without weights: a config.json, and a tokenizer of a few words."""
    words = {word: i for i, word in enumerate(("[UNK]", "[EOS]", "[MASK]", "a", "b"))}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}
    tokenizer = dict.fromkeys(
        ("truncation", "padding", "normalizer", "post_processor", "decoder"), None
    )
    tokenizer |= {"version": "1.0", "added_tokens": [], "model": model}
    contents = {
        "config.json": SHAPES[shape],
        "tokenizer.json": tokenizer | {"pre_tokenizer": {"type": "Whitespace"}},
        "mdm_jax.json": {"dtypes": {"weights": "float32"}},
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (directory / name).write_text(json.dumps(content), "utf-8")
    (directory / "text.txt").write_text("a b b a " * 20_000, "utf-8")
    weights = {"weights": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    header = json.dumps(weights).encode()
    stored = len(header).to_bytes(8, "little") + header + bytes(4)
    (directory / "model.safetensors").write_bytes(stored)
    return directory


def config(case: Case, source: pathlib.Path) -> Any:
    """The run's config."""
    from mdm_jax.launch import config as launch_config
    from mdm_jax.launch.ahead import targets

    made = launch_config.get_config()
    made.model.update(source=str(source), dtype="bfloat16", remat=case.remat, scan_layers=True)
    if targets.chip_of(case.topology).platform == "gpu":
        made.model.attention = "recompute"  # cuDNN is not there
    made.data.update(source="text", path=str(source / "text.txt"), length=1024)
    made.train.update(batch_size=case.rows, monitors=())
    made.optimizer.update(name=case.optimizer)
    made.mesh.update({"tensor": 1} | case.mesh)
    return made


def muon_update(mesh: Any) -> tuple[Any, tuple]:
    """Muon's update of twelve scanned layers of width 768, and its abstract arguments."""
    import jax
    import optax
    from jax.sharding import NamedSharding, PartitionSpec

    from mdm_jax import sharding, training

    def kernel(inward: int, outward: int, *axes: str | None) -> dict[str, Any]:
        where = NamedSharding(mesh, PartitionSpec(None, *axes))
        return {"kernel": jax.ShapeDtypeStruct((12, inward, outward), "float32", sharding=where)}

    params = {name: kernel(768, 768, "fsdp") for name in ("query", "key", "value")}
    params |= {"out": kernel(768, 768, None, "fsdp"), "up": kernel(768, 3072, "fsdp")}
    params |= {"down": kernel(3072, 768, None, "fsdp")}
    optimizer = training.muon(optax.constant_schedule(0.1))

    def update(params: Any, gradients: Any) -> Any:
        return optimizer.update(gradients, optimizer.init(params), params)[0]

    places = jax.tree.map(lambda leaf: leaf.sharding, params)
    update = sharding.sharded_apply(update, mesh, sharding.LOGICAL_RULES)
    return jax.jit(update, out_shardings=places), (params, params)


def experts_gradient(mesh: Any) -> tuple[Any, tuple]:
    """The gradient of a mixture of LLaDA-MoE's sizes, and its abstract arguments."""
    import jax
    import jax.numpy as jnp

    from mdm_jax import sharding
    from mdm_jax.models import moe

    layer = moe.Mixture(moe.Experts(64, 8, 1024), jnp.bfloat16, jnp.float32)
    rows = sharding.batch_sharding(mesh)
    x = jax.ShapeDtypeStruct((16, 1024, 2048), "float32", sharding=rows)
    init = lambda: layer.init(jax.random.key(0), jnp.zeros((1, 8, 2048)))  # noqa: E731
    arguments = sharding.abstract_sharded(init, mesh), x
    gradient = jax.grad(lambda params, x: jnp.sum(layer.apply(params, x)), (0, 1))
    gradient = sharding.sharded_apply(gradient, mesh, sharding.LOGICAL_RULES)
    places = jax.tree.map(lambda leaf: leaf.sharding, arguments)
    return jax.jit(gradient, out_shardings=places), arguments


PARTS = {"muon": muon_update, "experts": experts_gradient}
"""Cases that are a part of a step, on CPU devices: they compile in half a minute."""


def compile_part(name: str, folder: pathlib.Path) -> None:
    """Compile one of PARTS as :func:`compile_case` does."""
    from mdm_jax import sharding
    from mdm_jax.launch.ahead import targets

    devices = targets.devices(CASES[name].topology)
    function, arguments = PARTS[name](sharding.make_mesh(**CASES[name].mesh, devices=devices))
    compiled = function.lower(*arguments).compile({"xla_backend_optimization_level": 0})
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    figures = {"temporaries": memory.temp_size_in_bytes, "memory": held, "devices": len(devices)}
    (folder / "program.txt").write_text(compiled.as_text(), "utf-8")
    (folder / "figures.json").write_text(json.dumps(figures), "utf-8")


def compile_case(name: str, folder: pathlib.Path) -> None:
    """Compile a case with the ``mdm_jax`` that is imported, of any commit since 0551755; write
    its text and figures."""
    from mdm_jax.launch.ahead import plan, targets

    if name in PARTS:
        return compile_part(name, folder)
    case = CASES[name]
    with tempfile.TemporaryDirectory() as source:
        devices = targets.devices(case.topology)
        made = plan.compile_plan(
            config(case, write_source(case.shape, pathlib.Path(source))), devices
        )
    kept = ("parameters", "arguments", "temporaries", "memory", "flops", "compile_seconds")
    (folder / "program.txt").write_text(made.text, "utf-8")
    figures = {key: getattr(made, key) for key in kept} | {"devices": len(devices)}
    (folder / "figures.json").write_text(json.dumps(figures), "utf-8")
    return None


def in_checkout(name: str, checkout: pathlib.Path, folder: pathlib.Path) -> None:
    """:func:`compile_case` in a process of its own, with the ``mdm_jax`` of a checkout."""
    folder.mkdir(parents=True, exist_ok=True)
    code = "import runpy, sys, pathlib; names = runpy.run_path(sys.argv[1]); "
    code += "names['compile_case'](sys.argv[2], pathlib.Path(sys.argv[3]))"
    searched = os.pathsep.join([str(checkout), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    flags_ = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    subprocess.run(
        [sys.executable, "-P", "-c", code, __file__, name, folder],
        check=True,
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": searched, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags_},
    )


def row(name: str, label: str, folder: pathlib.Path) -> str:
    """A line of the table, from what :func:`compile_case` wrote."""
    from mdm_jax.launch.ahead import collectives, program, targets

    case, figures = CASES[name], json.loads((folder / "figures.json").read_text("utf-8"))
    module = program.Module((folder / "program.txt").read_text("utf-8"), figures["devices"])
    kinds, chip = collectives.describe(collectives.find(module)), targets.chip_of(case.topology)
    sent = {kind: one.bytes_sent / 1e9 for kind, one in kinds.items()}
    total = sum(sent.values())
    beside = sum(one.overlapped for one in kinds.values()) / 1e9
    ways = ", ".join(f"{axis} {size}" for axis, size in case.mesh.items() if size > 1)
    cells = [case.shape, f"{case.topology}, {ways}", f"{case.rows}, {case.optimizer}, {case.remat}"]
    cells += [label, f"{figures['temporaries'] / 1e9:.2f}", f"{figures['memory'] / 1e9:.2f}"]
    cells += [f"{sent.get('all-reduce', 0.0):.3f}", f"{total:.3f}", f"{beside / total:.0%}"]
    if name in PARTS:
        cells += ["", ""]
    else:
        seconds = figures["flops"] / chip.flops, total * 1e9 / chip.links
        cells += [f"{seconds[0] * 1e3:.0f} / {seconds[1] * 1e3:.0f}"]
        cells += [f"{figures['compile_seconds']:.0f}"]
    return f"| {' | '.join(cells)} |"


HEADER = (
    "model", "chips, mesh", "rows, optimiser, remat", "code", "temporaries, GB",
    "memory of a chip, GB", "all-reduced, GB", "sent by a chip, GB", "beside products",
    "least ms: products / links", "compiled in, s",
)  # fmt: skip


def main(_: list[str]) -> None:
    checkouts = dict(entry.split("=", 1) for entry in _CHECKOUTS.value)
    names = _CASES.value or list(CASES)
    if unknown := sorted(set(names) - set(CASES)):
        raise app.UsageError(f"--cases: unknown {', '.join(unknown)}; known: {', '.join(CASES)}")
    print("|", " | ".join(HEADER), "|\n|" + " --- |" * len(HEADER))
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            for label, checkout in checkouts.items():
                folder = pathlib.Path(_KEEP.value or scratch) / label / name
                if not (folder / "figures.json").exists():
                    in_checkout(name, pathlib.Path(checkout).resolve(), folder.resolve())
                print(row(name, label, folder), flush=True)


if __name__ == "__main__":
    app.run(main)
