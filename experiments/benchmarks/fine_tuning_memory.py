"""Memory of fine-tuning LLaDA-8B and Dream-7B by choice, by the compiler of accelerators not here.

    python -m experiments.benchmarks.fine_tuning_memory --chips=h100:8 --figures=FILE.json \
        --bodies=llada-8b,dream-7b

compiles the launcher's training step as ``mdm compile --config=finetune`` does (what that needs:
docs/pods.md), from the shapes in ``experiments/benchmarks/shapes``, and prints a table. Nothing is
run. Each choice takes minutes; those that ``--figures`` holds already are not compiled again.
"""

import json
import pathlib
from typing import Any

import jax
from absl import app, flags, logging

from experiments.benchmarks import fine_tuning
from experiments.benchmarks.command import markdown, why
from mdm_jax.launch.ahead import plan, targets

_BODIES = flags.DEFINE_list("bodies", ["llada-8b", "dream-7b"], "Names or directories of models.")
_CHOICES = flags.DEFINE_list("choices", [], "Names of rows; none: all.")
_TOPOLOGY = flags.DEFINE_string("chips", "h100:8", "As --topology of mdm compile.")
_ROWS = flags.DEFINE_integer("planned_rows", 16, "Rows of all devices.", 1)
_LENGTH = flags.DEFINE_integer("planned_length", 1024, "Tokens of a row.", 1)
_OUT = flags.DEFINE_string("figures", None, "Where figures are kept as JSON.")

_HALF = {"model.param_dtype": "bfloat16", "optimizer.ema_dtype": "bfloat16"}
_MOMENTS = ("optimizer.first_moment_dtype", "optimizer.second_moment_dtype")
_SMALL = _HALF | dict.fromkeys(_MOMENTS, "bfloat16")
_LORA = {"adapter.name": "lora", "adapter.base_dtype": "bfloat16"}
CHOICES: dict[str, dict[str, Any]] = {
    "all float32": {},
    "moments bfloat16": dict.fromkeys(_MOMENTS, "bfloat16"),
    "moments int8": dict.fromkeys(_MOMENTS, "int8"),
    "all bfloat16": _SMALL,
    "bfloat16 + moments int8": _HALF | dict.fromkeys(_MOMENTS, "int8"),
    "+ remat attention": _SMALL | {"model.remat": "attention"},
    "+ remat dots_without_batch": _SMALL | {"model.remat": "dots_without_batch"},
    "+ remat offload_inputs": _SMALL | {"model.remat": "offload_inputs"},
    "+ remat offload_dots": _SMALL | {"model.remat": "offload_dots"},
    "+ tensor 2": _SMALL | {"mesh.fsdp": 4, "mesh.tensor": 2},
    "adapters": _LORA,
    "adapters + remat dots_without_batch": _LORA | {"model.remat": "dots_without_batch"},
}
"""Settings by name, beside those of :func:`configured`."""


def configured(body: str, changes: dict[str, Any], devices: int) -> Any:
    """:func:`fine_tuning.configured` for a mesh of fsdp."""
    # cuDNN's kernel cannot be compiled where its library is not.
    attention = "recompute" if targets.chip_of(_TOPOLOGY.value).platform == "gpu" else "auto"
    mesh = {"mesh.data": 1, "mesh.fsdp": devices, "model.attention": attention}
    size = _ROWS.value, _LENGTH.value
    return fine_tuning.configured(body, mesh | changes, *size, changes.get("model.remat", "full"))


def measure(body: str, name: str, devices: Any) -> dict[str, Any]:
    """Bytes of a device by kind, and products, of one choice; the reason where it has no plan."""
    config = configured(body, CHOICES[name], len(devices))
    try:
        made = plan.compile_plan(config, devices)
    except (MemoryError, ValueError, RuntimeError) as error:
        return {"unavailable": why(error)}
    return {
        **made.state,
        "temporaries": made.temporaries,
        "host": made.host,
        "memory": made.memory,
        "flops": made.flops,
        "sent": sum(one.bytes_sent for one in made.collectives),
        "compile_seconds": made.compile_seconds,
    }


def row(name: str, found: dict[str, Any]) -> list[str]:
    if "unavailable" in found:
        return [name, *["-"] * 8, found["unavailable"][:60]]
    parameters = found["params"] + found.get("frozen", 0)
    sizes = [parameters, found["opt_state"], found["ema"], found["temporaries"], found["memory"]]
    gigabytes = [f"{size / 1e9:.2f}" for size in [*sizes, found["host"], found["sent"]]]
    return [name, *gigabytes, f"{found['flops'] / 1e12:.0f}", f"{found['compile_seconds']:.0f}"]


_HEADER = (
    *("choice", "parameters", "moments", "average", "temporaries", "sum", "host", "sent"),
    *("TFLOP", "compiled, s"),
)


def main(_: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")  # what is here is not used
    logging.set_verbosity(logging.WARNING)
    out = _OUT.value and pathlib.Path(_OUT.value)
    record = json.loads(out.read_text("utf-8")) if out and out.exists() else {}
    devices = targets.devices(_TOPOLOGY.value)
    print(f"{_TOPOLOGY.value}, {_ROWS.value} rows of {_LENGTH.value}; GB (1e9 bytes) of a device")
    for body in _BODIES.value:
        rows = []
        for name in _CHOICES.value or CHOICES:
            key = f"{body}, {name}, {_TOPOLOGY.value}, {_ROWS.value} x {_LENGTH.value}"
            if key not in record:
                record[key] = measure(body, name, devices)
                print(key, record[key], flush=True)
                if out:
                    out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
            rows.append(row(name, record[key]))
        print("\n".join([f"\n{body}\n", *markdown(_HEADER, rows)]), flush=True)


if __name__ == "__main__":
    app.run(main)
