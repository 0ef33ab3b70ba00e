"""Speed and host memory of ``hub.load``, on a random model made for the purpose.

python -m experiments.benchmarks.hub_load

makes a directory in the layout of Qwen3-0.6B (1.2 GB in bfloat16) and loads it in fresh processes:
with the file in the page cache and without, beside a plain read of its bytes. Host memory is the
peak of the process (VmHWM) over what it had before loading; on a CPU the parameters are in it.
"""

import functools
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

import mdm_jax.hub.files
from mdm_jax import hub

_DEPTH = flags.DEFINE_integer("layers", 28, "Layers of the model.", lower_bound=1)
_STORED = flags.DEFINE_string("stored", "bfloat16", "dtype of the file.")
_DTYPES = flags.DEFINE_list("dtypes", ["bfloat16", "float32"], "dtypes to load as.")
_DEVICES = flags.DEFINE_integer("devices", 1, "Host devices that parameters are sharded over.")
_DIRECTORY = flags.DEFINE_string("directory", None, "Where the model is made; None: temporary.")
_LOAD = flags.DEFINE_string("load", None, "For processes of the benchmark itself.")

CONFIG = {
    "architectures": ["A2DQwen3LMHeadModel"],
    "model_type": "a2d-qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}


def make(directory: pathlib.Path, config: dict, dtype: str) -> None:
    """Write a model of random weights with these fields of config.json."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    heads, key_heads = (
        config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads")
    )
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    shapes["model.norm.weight"] = (width,)
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}."
        shapes |= {
            block + f"{name}_layernorm.weight": (width,) for name in ("input", "post_attention")
        }
        shapes |= {block + f"self_attn.{name}_norm.weight": (config["head_dim"],) for name in "qk"}
        shapes |= {block + f"self_attn.{name}_proj.weight": (key_heads, width) for name in "kv"}
        shapes[block + "self_attn.q_proj.weight"] = (heads, width)
        shapes[block + "self_attn.o_proj.weight"] = (width, heads)
        shapes |= {block + f"mlp.{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
        shapes[block + "mlp.down_proj.weight"] = (width, hidden)
    rng = np.random.default_rng(0)

    def random(shape: tuple[int, ...]) -> np.ndarray:
        return (0.03 * rng.standard_normal(shape, np.float32)).astype(dtype)

    tensors = {
        name: mdm_jax.hub.files.Tensor(shape, dtype, functools.partial(random, shape))
        for name, shape in shapes.items()
    }
    mdm_jax.hub.files.write_tensors(directory, tensors, 10**12)
    (directory / "config.json").write_text(json.dumps(config | {"torch_dtype": dtype}), "utf-8")


def memory(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in pathlib.Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {field}")


def load(directory: str, dtype: str, devices: int) -> dict[str, float]:
    """Load in this process: seconds, and bytes above those before."""
    import jax

    from mdm_jax import sharding

    mesh = None
    if devices > 1:
        jax.config.update("jax_num_cpu_devices", devices)
        mesh = sharding.make_mesh(fsdp=devices)
    jax.jit(lambda x: x.sum())(np.ones(8)).block_until_ready()  # starts the runtime
    before, start, used = memory("VmRSS"), time.perf_counter(), time.process_time()
    model = hub.load(directory, dtype=dtype, mesh=mesh)
    jax.block_until_ready(model.params)
    seconds = time.perf_counter() - start
    leaves = jax.tree.leaves(model.params)
    return {
        "seconds": seconds,
        "processor_seconds": time.process_time() - used,
        "peak": memory("VmHWM") - before,
        "parameters": sum(leaf.nbytes for leaf in leaves),
        "largest": max(leaf.nbytes for leaf in leaves),
    }


def plain_read(path: pathlib.Path) -> float:
    """Seconds of reading a file's bytes into a small buffer."""
    buffer, start = bytearray(2**23), time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


def forget(path: pathlib.Path) -> None:
    """Ask the system to drop a file from its page cache."""
    import os

    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(_: list[str]) -> None:
    if _LOAD.value:
        print(json.dumps(load(_LOAD.value, _DTYPES.value[0], _DEVICES.value)))
        return
    with tempfile.TemporaryDirectory(dir=_DIRECTORY.value) as name:
        directory = pathlib.Path(name)
        make(directory, CONFIG | {"num_hidden_layers": _DEPTH.value}, _STORED.value)
        file = directory / "model.safetensors"
        size = file.stat().st_size
        print(f"{size / 1e9:.2f} GB of {_STORED.value}\n")
        print(
            "| load as | cache | plain read, GB/s | load, GB/s | seconds | processor seconds "
            "| peak, MB | allowed, MB |"
        )
        print("| --- | --- |" + " ---: |" * 6)
        for dtype in _DTYPES.value:
            for cache in ("cold", "warm"):
                forget(file) if cache == "cold" else plain_read(file)
                read = plain_read(file)
                forget(file) if cache == "cold" else None
                command = [sys.executable, "-m", "experiments.benchmarks.hub_load"]
                options = [f"--load={name}", f"--dtypes={dtype}", f"--devices={_DEVICES.value}"]
                run = subprocess.run(
                    [*command, *options], stdout=subprocess.PIPE, text=True, check=True
                )
                found = json.loads(run.stdout.splitlines()[-1])
                allowed = found["parameters"] + 1.2 * found["largest"]
                speeds = [size / seconds / 1e9 for seconds in (read, found["seconds"])]
                times = (found["seconds"], found["processor_seconds"])
                figures = tuple(f"{figure:.2f}" for figure in (*speeds, *times))
                bytes_ = (f"{found['peak'] / 1e6:.0f}", f"{allowed / 1e6:.0f}")
                print("|", " | ".join((dtype, cache, *figures, *bytes_)), "|", flush=True)


if __name__ == "__main__":
    app.run(main)
