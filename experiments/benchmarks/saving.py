"""How long saving a state holds up training, and how long its files take.

python -m experiments.benchmarks.saving --gigabytes=1

makes a state of 16 float32 arrays and takes turns: steps alone; a save, then steps until all files
are described (the training loop's way); a save that waits for its files. A step adds to every
array, its buffers donated. The disk is that of ``--saves_in``.
"""

import statistics
import tempfile
import time

import jax
from absl import app, flags, logging

from experiments.benchmarks import command
from mdm_jax import training

_SIZE = flags.DEFINE_float("gigabytes", 1.0, "Size of the state.", 0.001)
_TURNS = flags.DEFINE_integer("turns", 5, "Saves of each kind.", 1)
_PLACE = flags.DEFINE_string("saves_in", None, "Where states are saved; None: temporary.")


def measure(size: float, turns: int, directory: str) -> dict[str, list[float]]:
    """Seconds of each turn, by what was measured."""
    rows = int(size * 1e9 / 4 / 16 / 1024)
    keys = jax.random.split(jax.random.key(0), 16)
    make = jax.jit(lambda key: jax.random.normal(key, (rows, 1024)))
    state = {f"kernel_{i}": make(key) for i, key in enumerate(keys)}
    add = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    checkpoints = training.Checkpoints(directory, keep_last=1)
    seconds: dict[str, list[float]] = {}

    def step(kind: str) -> None:
        nonlocal state
        begun = time.monotonic()
        state = jax.block_until_ready(add(state))
        seconds.setdefault(kind, []).append(time.monotonic() - begun)

    number = 0
    for turn in range(turns + 1):
        for _ in range(5):
            step("a step alone")
        for kind in ("a save in the background", "a save that is waited for"):
            number += 1
            begun = time.monotonic()
            checkpoints.save(number, state, {}, {})
            if kind == "a save that is waited for":
                checkpoints.wait()
            seconds.setdefault(kind, []).append(time.monotonic() - begun)
            if kind == "a save in the background":
                step("the first step beside it")
                manifest = checkpoints.directory / f"manifests/last/{number}.json"
                while not manifest.exists():
                    step("further steps beside it")
                checkpoints.wait()
                seconds.setdefault("its files", []).append(time.monotonic() - begun)
        if turn == 0:  # of warm-up
            seconds.clear()
    checkpoints.close()
    return seconds


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    with tempfile.TemporaryDirectory(dir=_PLACE.value) as directory:
        seconds = measure(_SIZE.value, _TURNS.value, directory)
    print("| what | seconds, median | least and most | times |\n| --- | ---: | ---: | ---: |")
    for name, values in seconds.items():
        most = f"{min(values):.3f}-{max(values):.3f}"
        print(f"| {name} | {statistics.median(values):.3f} | {most} | {len(values)} |")
    command.write({"gigabytes": _SIZE.value, "seconds": seconds})


if __name__ == "__main__":
    app.run(main)
