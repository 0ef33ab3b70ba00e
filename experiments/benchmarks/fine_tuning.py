"""Fine-tuning of a released model's shape: rows per second, beside the same shape in PyTorch.

    python -m experiments.benchmarks.fine_tuning [--body=qwen3-0.6b] [--tuned=all,adapters]
        [--tuned_rows=8] [--tuned_length=1024] [--tuned_steps=10] [--tuned_remat=full]

Steps are those of ``mdm train --config=finetune``: random parameters in the shape of a config.json
(``experiments/benchmarks/shapes``), products in bfloat16. "all" has float32 parameters, "bfloat16"
narrow ones, "adapters" float32 factors of rank 16 beside frozen bfloat16 kernels. Where torch and
transformers are installed, their Qwen3 of the same shape, seen both ways, takes turns with ours in
one process: bfloat16 autocast over float32 parameters, fused AdamW, logits at all positions,
checkpointed blocks under ``--tuned_remat=full``; no average of the parameters. Medians, quartiles.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging

_BODY = flags.DEFINE_string("body", "qwen3-0.6b", "A folder of shapes, or one with config.json.")
_TUNED = flags.DEFINE_list("tuned", ["all", "adapters"], "all, bfloat16, adapters.")
_ROWS = flags.DEFINE_integer("tuned_rows", 8, "Rows of a step.", 1)
_LENGTH = flags.DEFINE_integer("tuned_length", 1024, "Tokens of a row.", 1)
_STEPS = flags.DEFINE_integer("tuned_steps", 10, "Timed steps of each.", 1)
_REMAT = flags.DEFINE_string("tuned_remat", "full", "model.remat.")

SHAPES = pathlib.Path(__file__).parent / "shapes"
TUNED: dict[str, dict[str, Any]] = {
    "all": {},
    "bfloat16": {
        "model.param_dtype": "bfloat16",
        "optimizer.first_moment_dtype": "bfloat16",
        "optimizer.second_moment_dtype": "bfloat16",
        "optimizer.ema_dtype": "bfloat16",
    },
    "adapters": {"adapter.name": "lora", "adapter.base_dtype": "bfloat16"},
}
"""Settings by what is trained, and how it is stored."""


def folder(body: str) -> pathlib.Path:
    """Of a shape by name, or the directory itself."""
    return SHAPES / body if (SHAPES / body).is_dir() else pathlib.Path(body)


def configured(body: str, changes: dict[str, Any], rows: int, length: int, remat: str) -> Any:
    """``--config=finetune`` of a body: products in bfloat16, layers scanned."""
    from mdm_jax.launch import presets

    config = presets.finetune()
    config.model.source = str(folder(body))
    config.data.length, config.train.batch_size = length, rows
    config.model.update(dtype="bfloat16", scan_layers=True, remat=remat)
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


def ours(config: Any) -> tuple[Callable[[], Any], int | None]:
    """A call that takes the next step, and the bytes that the compiler plans for it."""
    import jax

    from mdm_jax import sharding, training
    from mdm_jax.launch.ahead import stand_in
    from mdm_jax.launch.build import make_experiment

    with stand_in.with_outline(config) as outlined:
        experiment = make_experiment(outlined, read=stand_in.dataset)
    # There are no weights to read.
    state = dataclasses.replace(experiment, source=None).initial_state()
    constants = [experiment.placed_seed()]
    if experiment.adapter is not None:
        key = jax.random.key(0)
        constants.append(
            sharding.init_sharded(lambda: experiment.init_model(key), experiment.mesh)[0]
        )
    batches = experiment.train_batches()
    batch = next(batches)
    batches.close()
    step = training.compile_step(
        experiment.step, experiment.abstract_state(), experiment.abstract_batch(), *constants
    )
    held = [state]

    def call() -> Any:
        held[0], metrics = step.call(held[0], batch)
        return jax.block_until_ready(metrics)

    call()
    return call, step.memory_bytes


def theirs(body: str, rows: int, length: int, remat: str) -> Callable[[], Any]:
    """As :func:`ours`, in PyTorch; ImportError without torch and transformers."""
    import torch
    import transformers

    raw = json.loads((folder(body) / "config.json").read_text("utf-8"))
    raw = {name: raw[name] for name in raw if name not in ("architectures", "torch_dtype")}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = transformers.Qwen3Config(**raw, attn_implementation="sdpa")
    model = transformers.Qwen3ForCausalLM(config).to(device).train()
    if remat == "full":
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")
    tokens = torch.randint(0, raw["vocab_size"] - 1, (rows, length), device=device)
    both_ways = torch.zeros((1, 1, length, length), dtype=torch.bfloat16, device=device)

    def call() -> float:
        masked = torch.rand(tokens.shape, device=device) < torch.rand((rows, 1), device=device)
        inputs = torch.where(masked, raw["mask_token_id"], tokens)
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(inputs, attention_mask=both_ways, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[masked].float(), tokens[masked])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    call()
    return call


def measure(
    body: str, tuned: Sequence[str], rows: int, length: int, steps: int, remat: str
) -> dict[str, Any]:
    """Rows per second and planned bytes by name; "PyTorch" beside them where it is installed."""
    from experiments.benchmarks import command

    made, records = {}, {}
    for name in command.choose(TUNED, tuned, {}):
        records[name] = {}
        try:
            config = configured(body, TUNED[name], rows, length, remat)
            made[name], records[name]["memory_bytes"] = ours(config)
        except Exception as error:  # out of memory, too: the others are still of use
            records[name]["unavailable"] = command.why(error)
    try:
        made["PyTorch"], records["PyTorch"] = theirs(body, rows, length, remat), {}
    except Exception as error:
        records["PyTorch"] = {"unavailable": command.why(error)}
    for name, times in command.interleaved(made, rounds=steps, seconds=0.0).items():
        records[name]["seconds"] = command.summary(times)
        records[name]["rows_per_second"] = command.summary([rows / taken for taken in times])
    return {"body": body, "rows": rows, "length": length, "remat": remat, "tuned": records}


def table(record: dict[str, Any]) -> list[str]:
    """The record in Markdown."""
    from experiments.benchmarks import command

    def row(name: str, figures: dict[str, Any]) -> tuple[str, ...]:
        size = figures.get("memory_bytes")
        return (
            name,
            command.spread(figures["seconds"], 3),
            command.spread(figures["rows_per_second"]),
            f"{size / 1e9:.2f}" if size else "-",
        )

    header = ("trained", "step, s", "rows/s", "planned GB")
    return command.record_table(header, record["tuned"], row)


def main(_: list[str]) -> None:
    # torch and JAX share a GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from experiments.benchmarks import command, machine

    logging.set_verbosity(logging.WARNING)
    print(machine.describe(machine.facts()), flush=True)
    size = {"rows": _ROWS.value, "length": _LENGTH.value, "steps": _STEPS.value}
    record = measure(_BODY.value, _TUNED.value, remat=_REMAT.value, **size)
    print("\n".join([f"\n{_BODY.value}, {size}, remat {_REMAT.value}\n", *table(record)]))
    command.write(record)


if __name__ == "__main__":
    app.run(main)
