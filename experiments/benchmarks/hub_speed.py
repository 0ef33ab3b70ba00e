"""Forward and generation of a Qwen3 body beside transformers' own forward of the same directory.

python -m experiments.benchmarks.hub_speed --packages=VENV/lib/python3.11/site-packages

where torch and transformers are installed in that place, or without the flag if they are here. The
process is bound to one core. A random model of 100M parameters is written once and read by both; in
float32 and bfloat16 calls take turns. Figures are medians of processor seconds with quartiles, of
one run. Generation is compared with the forward passes that the same decoding needs, nothing else
on their side; whole requests: ``evaluation_speed``.
"""

import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import app, flags

_PACKAGES = flags.DEFINE_string("packages", None, "site-packages with torch and transformers.")
_DTYPES = flags.DEFINE_list("precisions", ["float32", "bfloat16"], "Of products and parameters.")
_ROUNDS = flags.DEFINE_integer("times", 7, "Calls of each.", lower_bound=3)
_LENGTH = flags.DEFINE_integer("sequence", 256, "Tokens; half are the prompt.", lower_bound=64)
_STEPS = flags.DEFINE_integer(
    "decoding_steps", 16, "Decoding steps of the new tokens.", lower_bound=4
)
_DEPTH = flags.DEFINE_integer("num_layers", 12, "Layers of the model.", lower_bound=1)
_WIDTH = flags.DEFINE_integer("hidden_size", 768, "Width, a multiple of 64.", lower_bound=64)

BLOCKS = 4
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 32768,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2048,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}


def config() -> dict[str, Any]:
    """:data:`CONFIG` of the width and depth asked for."""
    width = _WIDTH.value
    return CONFIG | {
        "hidden_size": width,
        "num_attention_heads": width // 64,
        "num_key_value_heads": max(width // 192, 1),
        "intermediate_size": width * 8 // 3,
        "num_hidden_layers": _DEPTH.value,
    }


def ours(directory: str, dtype: str, ids: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Calls of this package, compiled."""
    import jax

    from mdm_jax import hub

    model = hub.load(directory, dtype=dtype)
    both_ways = hub.bidirectional(model)
    prompt, new = ids[:, : ids.shape[1] // 2], ids.shape[1] // 2
    shared = {"mask_id": CONFIG["vocab_size"] - 1, "stop": False, "block_size": new // BLOCKS}

    def generate(rule: str, steps: int) -> Any:
        return hub.generate(both_ways, prompt, new, rule=rule, steps=steps, **shared).tokens

    calls = {
        "forward": lambda: model.logits(ids),
        "generation": lambda: generate("dllm", _STEPS.value),
        "generation, cached": lambda: generate("dllm_blocks", _STEPS.value // BLOCKS),
    }

    calls = {
        name: lambda call=call: np.asarray(jax.block_until_ready(call()))
        for name, call in calls.items()
    }
    for call in calls.values():
        call()
    return calls


def theirs(directory: str, dtype: str, ids: np.ndarray) -> dict[str, Callable[[], Any]]:
    """The forward passes of transformers, by the same names."""
    import torch
    import transformers

    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    tokens = torch.tensor(ids)
    half = ids.shape[1] // 2
    size = half // BLOCKS

    @torch.inference_mode()
    def forward() -> np.ndarray:
        return model(tokens, use_cache=False).logits.float().numpy()

    @torch.inference_mode()
    def steps() -> None:
        for _ in range(_STEPS.value):
            model(tokens, use_cache=False)

    @torch.inference_mode()
    def cached() -> None:
        cache = transformers.DynamicCache()
        model(tokens[:, :half], past_key_values=cache, logits_to_keep=1)
        for start in range(half, 2 * half, size):
            for _ in range(_STEPS.value // BLOCKS):
                model(tokens[:, start : start + size], past_key_values=cache)
                cache.crop(-size)
            model(tokens[:, start : start + size], past_key_values=cache, logits_to_keep=1)

    return {"forward": forward, "generation": steps, "generation, cached": cached}


def interleaved(calls: dict, rounds: int) -> dict:
    """Processor seconds of calls that take turns; other jobs on the core lengthen them little."""
    times: dict = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    return times


def main(_: list[str]) -> None:
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})  # before either library starts its threads
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    )
    if _PACKAGES.value:
        sys.path.append(_PACKAGES.value)  # behind our own
    try:
        import torch
        import transformers
    except ImportError as error:
        print(f"not measured: {error}; name the site-packages that have it with --packages")
        return
    from experiments.benchmarks import command, machine
    from experiments.benchmarks.hub_load import make

    print(machine.describe(machine.facts()))
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, one core\n")
    ids = np.random.default_rng(0).integers(0, CONFIG["vocab_size"] - 1, (1, _LENGTH.value))
    rows = []
    for dtype in _DTYPES.value:
        with tempfile.TemporaryDirectory() as name:
            make(pathlib.Path(name), config(), dtype)
            pairs = ours(name, dtype, ids), theirs(name, dtype, ids)
            values = [calls["forward"]() for calls in pairs]
            print(f"{dtype}: logits differ by at most {np.abs(values[0] - values[1]).max():.1e}")
            calls = {
                (name, side): side_calls[name]
                for name in pairs[0]
                for side, side_calls in zip(("ours", "theirs"), pairs)
                if name in side_calls
            }
            times = interleaved(calls, _ROUNDS.value)
        for name in pairs[0]:
            own, other = times[name, "ours"], times[name, "theirs"]
            figures = [command.spread(command.summary(t), 3) for t in (own, other)]
            speed = command.spread(command.ratios(other, own))
            rows.append((f"{name}, {dtype}", *figures, speed))
    header = ("call", "mdm_jax, s", "transformers, s", "speed over transformers")
    print()
    print("\n".join(command.markdown(header, rows)))


if __name__ == "__main__":
    app.run(main)
