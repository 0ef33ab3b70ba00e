"""A run of several processes that is killed again and again, and must not differ from one that is
not.

python -m experiments.benchmarks.soak --soak_processes=4 --kills=8

trains a small model twice in as many processes of this machine, saving every other step: once from
beginning to end, and once with SIGKILL to one or all of the processes at random moments of the
training, each time started again by the same command line. Losses of all steps and the last state
must be the same bits. Prints every kill and its seconds, the checkpoints that a kill left
unfinished, and how long saving held up the loop. Most of a start is compilation: on CPUs the cache
serves process 0 alone. With ``--soak_directory`` a soak that was interrupted goes on.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from absl import app, flags, logging

from mdm_jax import training
from mdm_jax.training import manifests

_PROCESSES = flags.DEFINE_integer("soak_processes", 4, "Processes of the run.", 1)
_KILLS = flags.DEFINE_integer("kills", 8, "Kills before the run may end.", 1)
_STEPS = flags.DEFINE_integer("soak_steps", 64, "Steps of the run.", 4)
_WIDTH = flags.DEFINE_integer("soak_width", 64, "Width of the model, for the size of its state.", 4)
_SEED = flags.DEFINE_integer("soak_seed", 0, "Of the moments of the kills.")
_DIRECTORY = flags.DEFINE_string(
    "soak_directory", None, "Keeps the runs, and the same command goes on; None: temporary."
)

_COMPILE_FAST = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)

ROOT = pathlib.Path(__file__).resolve().parents[2]


def arguments(workdir: pathlib.Path, steps: int, width: int) -> list[str]:
    """The command line of the run."""
    return [
        *("--config=quickstart:smoke", f"--workdir={workdir}", f"--config.train.steps={steps}"),
        *("--config.train.log_every=1", "--config.train.checkpoint_every=2"),
        *(f"--config.train.evaluate_every={steps // 2}", "--config.optimizer.name=adamw"),
        *("--config.train.monitors=()", "--config.panel.cost=0"),  # less to compile
        *(f"--config.model.width={width}", "--config.sample.num_samples=1"),
        *("--config.evaluate.max_rows=8", "--config.sample.gap=0"),
    ]


def start(line: list[str], processes: int, log: pathlib.Path) -> list[subprocess.Popen]:
    """The run in its processes; what process 0 says goes to ``log``."""
    with socket.create_server(("localhost", 0)) as free:
        address = f"localhost:{free.getsockname()[1]}"
    together = [f"--coordinator_address={address}", f"--num_processes={processes}"]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(log.parent / "compiled")}
    fast = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": _COMPILE_FAST}
    command = [sys.executable, "-m", "mdm_jax.launch", "train", *line]
    with log.open("ab") as first:
        return [
            subprocess.Popen(
                [*command, *together, f"--process_id={number}"] if processes > 1 else command,
                stdout=first if number == 0 else subprocess.DEVNULL,
                stderr=first if number == 0 else subprocess.DEVNULL,
                cwd=ROOT,
                env=cache | dict(os.environ) | fast,
            )
            for number in range(processes)
        ]


def end(started: list[subprocess.Popen]) -> None:
    """SIGKILL to all that are left."""
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


def steps_said(log: pathlib.Path) -> int:
    """Lines of steps in a log."""
    return len(re.findall(rb"step \d+/\d+ ", log.read_bytes()))


def run(line: list[str], processes: int, log: pathlib.Path) -> None:
    """To its end; RuntimeError if it fails."""
    started = start(line, processes, log)
    try:
        codes = [process.wait() for process in started]
    finally:
        end(started)
    if any(codes):
        raise RuntimeError(f"exit statuses {codes}: {log.read_bytes()[-3000:].decode()}")


def kill_once(line: list[str], processes: int, log: pathlib.Path, rng: random.Random) -> str:
    """Kills the run at a random moment of its training; who was killed, "" if it ended before."""
    before, started = steps_said(log), start(line, processes, log)
    try:
        wanted = before + rng.randrange(1, 12)
        while steps_said(log) < wanted and all(process.poll() is None for process in started):
            time.sleep(0.01)
        time.sleep(rng.random() * 0.5)
        if all(process.poll() == 0 for process in started):
            return ""
        if any(process.poll() not in (None, 0) for process in started):
            raise RuntimeError(f"it fails by itself: {log.read_bytes()[-3000:].decode()}")
        one = rng.randrange(-1, processes)
        for process in started if one < 0 else [started[one]]:
            process.send_signal(signal.SIGKILL)
        if one >= 0:  # the others are to end by themselves, and may be killed in that
            time.sleep(rng.random())
        return "all" if one < 0 else f"process {one}"
    finally:
        end(started)


def losses(workdir: pathlib.Path) -> list[tuple[int, float]]:
    """(step, loss) of every logging step."""
    records = training.read_metrics(workdir / "metrics.jsonl", "train")
    return [(record["step"], record["loss"]) for record in records]


def last_state(workdir: pathlib.Path) -> str:
    """A digest of the newest state."""
    checkpoints = training.CheckpointReader(workdir / "checkpoints")
    step = checkpoints.steps()[-1]
    arrays = manifests.read(checkpoints.directory / f"manifests/last/{step}.json")["arrays"]
    device, shapes = jax.sharding.SingleDeviceSharding(jax.devices()[0]), {}
    for name, form in arrays.items():
        dtype, shape = form.split("[")
        shapes[name] = jax.ShapeDtypeStruct(json.loads(f"[{shape}"), dtype, sharding=device)
    state, digest = checkpoints.restore_step(step, shapes), hashlib.sha256(f"{step}".encode())
    checkpoints.close()
    for name in sorted(state):
        digest.update(name.encode() + np.asarray(state[name]).tobytes())
    return digest.hexdigest()


def soak(
    directory: pathlib.Path, processes: int, kills: int, steps: int, width: int, seed: int
) -> dict:
    """What happened; AssertionError if the killed run is another one.

    Goes on from what an earlier call with the same settings left in the directory.
    """
    whole, killed = directory / "whole", directory / "killed"
    settings = {"processes": processes, "steps": steps, "width": width, "seed": seed}
    known, ended, record = (directory / name for name in ("settings.json", "ended", "kills.jsonl"))
    if known.exists() and json.loads(known.read_text()) != settings:
        raise ValueError(
            f"--soak_directory: {directory} holds a soak with {known.read_text()}, not {settings}; "
            "give the same settings to go on, or another directory"
        )
    if not known.exists() and (whole.exists() or killed.exists()):
        raise ValueError(
            f"--soak_directory: {directory} holds runs of something else; give another directory"
        )
    known.write_text(json.dumps(settings))
    if not ended.exists():
        shutil.rmtree(
            whole, ignore_errors=True
        )  # of a soak that was interrupted: it may not resume
        begun = time.monotonic()
        run(arguments(whole, steps, width), processes, directory / "whole.log")
        ended.write_text(f"{time.monotonic() - begun}")
        print(f"the run without kills took {time.monotonic() - begun:.0f} s", flush=True)
    line, log = arguments(killed, steps, width), directory / "killed.log"
    log.touch()
    record.touch()
    done = [json.loads(each) for each in record.read_text().splitlines()]
    while len(done) < kills:
        begun = time.monotonic()
        who = kill_once(line, processes, log, random.Random(f"{seed} {len(done)}"))
        if not who:
            break
        reached = int(re.findall(rb"step (\d+)/", log.read_bytes())[-1])
        done.append({"who": who, "step": reached, "seconds": time.monotonic() - begun})
        with record.open("a") as written:
            written.write(json.dumps(done[-1]) + "\n")
        print(f"kill {len(done)} of {kills}: {done[-1]}", flush=True)
    begun = time.monotonic()
    run(line, processes, log)
    print(f"the last part of the killed run took {time.monotonic() - begun:.0f} s", flush=True)
    assert losses(killed) == losses(whole), "the losses differ"
    assert last_state(killed) == last_state(whole), "the states differ"
    unfinished = sorted(path.name for path in (killed / "checkpoints").glob("damaged-*"))
    speeds = training.read_metrics(whole / "metrics.jsonl", "speed")
    return {
        "kills": done,
        "unfinished": unfinished,
        "steps": len(losses(whole)),
        "whole_seconds": float(ended.read_text()),
        "seconds_per_step": statistics.median(each["step_seconds"] for each in speeds),
        "saving_seconds_per_step": sum(each["saving_seconds"] for each in speeds) / steps,
    }


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves no process behind
    settings = [each.value for each in (_PROCESSES, _KILLS, _STEPS, _WIDTH, _SEED)]
    with contextlib.ExitStack() as stack:
        directory = _DIRECTORY.value or stack.enter_context(tempfile.TemporaryDirectory())
        pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
        found = soak(pathlib.Path(directory), *settings)
    print(json.dumps(found, indent=1))
    print("the same losses and the same last state as without kills")


if __name__ == "__main__":
    app.run(main)
