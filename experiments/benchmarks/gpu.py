"""Everything that is to be measured on one GPU, in ten minutes: a table of figures and goals.

    python -m experiments.benchmarks.gpu [--out=FILE.json] [--small_shapes]

Training steps of the L shape (the library with each attention, and the plain yardstick), generation
of 1024 tokens with a KV cache against without, and fine-tuning of the shape of Qwen3-0.6B, beside
PyTorch where torch and transformers are installed. Each is a benchmark of its own, which this one
composes: ``train_step``, ``cached_generation``, ``fine_tuning``. MFU counts all logits and divides
by the published peak of the chip (``mdm_jax/launch/ahead/targets.py``). What fails is reported, and
the rest goes on. ``--small_shapes`` runs everything at sizes for a CPU, whose figures mean nothing.
"""

import os
import time
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging

_SMALL = flags.DEFINE_bool("small_shapes", False, "Sizes for a CPU, to try the command.")

MFU, SPEED_UP = 0.45, 5.0
"""Goals: of the chip's published peak; of generation with a cache over without."""

ATTENTIONS = ("library", "attention cudnn", "attention recompute", "attention einsum")


def training(small: bool) -> tuple[list[list[str]], dict[str, Any]]:
    """Rows of the table, and the record, of the L shape's training step."""
    from experiments.benchmarks import command, setting, train_step

    shape = setting.SHAPES["L"]
    if small:
        shape = setting.Shape("tiny", 8, 11, 16, 1, 2, 4, 8, False)
    options = command.Options((*ATTENTIONS, setting.YARDSTICK), rounds=3, seconds=60 * (not small))
    record = train_step.measure(shape, options)
    peak, rows = published_peak(), []
    for name, found in record["variants"].items():
        if "unavailable" in found:
            rows.append([f"step of {shape.name}, {name}", "-", found["unavailable"][:60], ""])
            continue
        rate, seconds = found["model_flops_per_second"], command.spread(found["seconds"], 4)
        share = "no published peak" if peak is None else f"MFU {rate / peak:.1%}"
        goal = f"{MFU:.0%}" if name in ATTENTIONS[:2] else ""
        rows.append([f"step of {shape.name}, {name}", f"{seconds} s", share, goal])
    return rows, record


def generation(small: bool) -> tuple[list[list[str]], dict[str, Any]]:
    """Likewise of cached generation."""
    from experiments.benchmarks import cached_generation

    sizes = cached_generation.Sizes(
        rows=4, length=1024, blocks=(16,), width=768, depth=12, heads=12, vocab=50_256
    )
    if small:
        sizes = cached_generation.Sizes(2, 8, (4,), width=16, depth=1, heads=2, vocab=8)
    record = cached_generation.measure(sizes, repeats=1 if small else 3)
    rows = [
        [
            f"generation of {sizes.length}, {name}",
            f"{found['cached']:.2f} against {found['uncached']:.2f} s",
            f"{found['speed_up']:.1f} times uncached",
            f"{SPEED_UP:.0f} times",
        ]
        for name, found in record["generators"].items()
    ]
    return rows, record


def tuning(small: bool) -> tuple[list[list[str]], dict[str, Any]]:
    """Likewise of fine-tuning, beside PyTorch."""
    from experiments.benchmarks import command, fine_tuning

    size = {"rows": 8, "length": 16, "steps": 1} if small else {"rows": 8, "length": 1024}
    body = str(fine_tuning.SHAPES / "tiny") if small else "qwen3-0.6b"
    options = {"tuned": ("all", "adapters"), "remat": "full", "steps": 10}
    record = fine_tuning.measure(body, **options | size)
    rows = []
    for name, found in record["tuned"].items():
        label = f"fine-tuning, {name}"
        if "unavailable" in found:
            rows.append([label, "-", found["unavailable"][:60], ""])
        else:
            rate = command.spread(found["rows_per_second"])
            rows.append([label, f"{command.spread(found['seconds'], 4)} s", f"{rate} rows/s", ""])
    return rows, record


def published_peak() -> float | None:
    """FLOP/s in bfloat16 of the first device, by its kind; None for a chip without figures."""
    import jax

    from mdm_jax.launch.ahead.targets import CHIPS

    kind = jax.devices()[0].device_kind.lower()
    found = [chip.flops for name, chip in CHIPS.items() if chip.platform == "gpu" and name in kind]
    return found[0] if found else None


PARTS: dict[str, Callable[[bool], tuple[list[list[str]], dict[str, Any]]]] = {
    "training": training,
    "generation": generation,
    "tuning": tuning,
}


def measure(small: bool, show: Callable[[str], None] = print) -> dict[str, Any]:
    """Run all parts, print the table; the records by part, with the seconds that each took."""
    from experiments.benchmarks import command

    rows, records = [], {}
    for name, part in PARTS.items():
        started = time.monotonic()
        try:
            own, records[name] = part(small)
        except Exception as error:  # the other parts are still of use
            own, records[name] = [[name, "-", command.why(error)[:60], ""]], {}
        records[name]["seconds_in_all"] = time.monotonic() - started
        show(f"{name}: {records[name]['seconds_in_all']:.0f} s")
        rows += own
    show("\n".join(command.markdown(("what", "time", "figure", "goal"), rows)))
    return records


def main(_: list[str]) -> None:
    # torch and JAX share the GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from experiments.benchmarks import command, machine

    logging.set_verbosity(logging.WARNING)
    facts = machine.facts()
    print(machine.describe(facts), flush=True)
    if facts["platform"] != "gpu" and not _SMALL.value:
        raise app.UsageError(
            f"JAX runs on {facts['platform']}; this needs a GPU, or --small_shapes to try it"
        )
    command.write({"machine": facts, "parts": measure(_SMALL.value)})


if __name__ == "__main__":
    app.run(main)
