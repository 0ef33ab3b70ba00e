"""Training, sampling and first steps beside mdlm and bd3lms, each in a process on one core.

    python -m experiments.benchmarks.peers --mdlm=DIR --bd3lms=DIR --torch_python=VENV/bin/python
        [--shapes=S,M] [--rounds=10 --seconds=0] [--parts=training,sampling,first_step]
        [--variants=default|bfloat16|launchers|all|NAME,...] [--out=FILE.json]

DIR are checkouts of kuleshov-group/mdlm and bd3lms; the other interpreter has torch, numpy and
einops. All processes share one core and take turns. Figures are processor seconds, user and system,
as medians with quartiles over rounds; ratios are those of the rounds. Weights are random, dropout
is 0, and the peers' conditioning is narrow, so that parameters are about as many as ours. Sampling
is of 8 rows of 256 in 64 steps, on S; first steps, of S too, count from the start of the process.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

from experiments.benchmarks import command
from experiments.benchmarks.setting import Shape

_MDLM = flags.DEFINE_string("mdlm", None, "Checkout of kuleshov-group/mdlm.")
_BD3LMS = flags.DEFINE_string("bd3lms", None, "Checkout of kuleshov-group/bd3lms.")
_TORCH = flags.DEFINE_string("torch_python", sys.executable, "Interpreter that has torch.")
_PARTS = flags.DEFINE_list("parts", ["training", "sampling", "first_step"], "What is measured.")

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
STEPS = 64
REFERENCE = "library"


class Side(NamedTuple):
    """What takes turns: one line for the reader, and its part of a worker's job."""

    summary: str
    job: dict[str, Any]


def _side(summary: str, side: str, dtype: str = "float32", **job: Any) -> Side:
    return Side(summary, {"side": side, "dtype": dtype, **job})


_AS_THE_VARIANT = {"optimizer.name": "adamw", "variance.order": ("stratified",)}


def _launcher(summary: str, dtype: str = "float32", **config: Any) -> Side:
    return _side(summary, "launcher", dtype, config=config)


TRAIN = {
    REFERENCE: _side("the benchmark's variant", "library"),
    "launcher": _launcher("as mdm train compiles it; AdamW, stratified", **_AS_THE_VARIANT),
    "yardstick": _side("plain JAX", "yardstick"),
    "mdlm": _side("eager", "mdlm"),
    "mdlm compiled": _side("torch.compile, fused AdamW", "mdlm", compiled=True),
    "bd3lms": _side("eager, blocks of 16", "bd3lms"),
    "launcher defaults": _launcher("Muon, P-POTS"),
    "launcher network": _launcher(
        "no norm of queries and keys", **_AS_THE_VARIANT, **{"model.qk_norm": False}
    ),
    "launcher monitors": _launcher("no monitors", **_AS_THE_VARIANT, **{"train.monitors": ()}),
    "library bfloat16": _side("bfloat16 operands", "library", "bfloat16"),
    "launcher bfloat16": _launcher("bfloat16 operands", "bfloat16", **_AS_THE_VARIANT),
    "mdlm bfloat16": _side("eager, autocast", "mdlm", "bfloat16"),
    "mdlm compiled bfloat16": _side("compiled, autocast", "mdlm", "bfloat16", compiled=True),
    "bd3lms bfloat16": _side("eager, autocast", "bd3lms", "bfloat16"),
}
SETS = {
    "default": tuple(TRAIN)[:6],
    "bfloat16": (REFERENCE, *(name for name in TRAIN if name.endswith("bfloat16"))),
    "launchers": (
        *(REFERENCE, "library bfloat16"),
        *(name for name in TRAIN if name.startswith("launcher")),
    ),
    "all": tuple(TRAIN),
}
SAMPLERS = ("ancestral", "blocks, cached")
SAMPLE = {
    REFERENCE: _side("ours", "library", samplers=SAMPLERS),
    "mdlm": _side("with its cache", "mdlm"),
    "bd3lms": _side("with its cache, blocks of 16", "bd3lms"),
}
SAMPLE |= {
    f"{name} bfloat16": Side(summary, job | {"dtype": "bfloat16"})
    for name, (summary, job) in SAMPLE.items()
}


def _goals(*each: tuple[str, str, float]) -> list[tuple[str, str, float]]:
    narrow = [(f"{a} bfloat16", f"{b} bfloat16", most) for a, b, most in each]
    return [*each, *narrow]


GOALS = {
    ("training", "S"): _goals((REFERENCE, "mdlm compiled", 0.8), ("launcher", REFERENCE, 1.05)),
    ("training", "M"): _goals((REFERENCE, "mdlm compiled", 0.5), ("launcher", REFERENCE, 1.05)),
    ("sampling", "S"): _goals(("ancestral", "mdlm", 0.6), ("blocks, cached", "bd3lms", 0.25)),
}
"""Most of the second's time that the first may take: meant in bfloat16, on processors with units
for it, and read in float32 too."""
FIRST_STEP = {"library, cold": 12.0, "library, warm": 4.0}
"""Goals of the first step, processor seconds."""


class Worker:
    """A process of ``peers_worker`` on one core; ``call(name)`` returns its processor seconds.

    Raises:
        RuntimeError: if it ends, with the last line that it printed.
    """

    def __init__(self, job: dict[str, Any]):
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by close)
        python = _TORCH.value if "directory" in job else sys.executable
        self._process = start(
            [python, str(pathlib.Path(__file__).with_name("peers_worker.py")), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment(),
            text=True,
        )
        self.first, self.last = self._answer(), {}

    def call(self, name: str) -> float:
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        self.last = self._answer()
        return self.last["seconds"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._log.seek(0)
        lines = self._log.read().strip().splitlines() or ["no message"]
        raise RuntimeError(f"status {self._process.returncode}: {lines[-1]}")


_STARTED: list[subprocess.Popen] = []


def start(*arguments: Any, **options: Any) -> subprocess.Popen:
    """A child, which :func:`main` does not outlive."""
    _STARTED.append(subprocess.Popen(*arguments, **options))
    return _STARTED[-1]


@contextlib.contextmanager
def ending_children() -> Iterator[None]:
    """Ends what :func:`start` started, also where SIGTERM ends this process."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        for process in _STARTED:
            process.kill()
            process.wait()
        signal.signal(signal.SIGTERM, before)


def environment() -> dict[str, str]:
    """Of workers: this repository on the path; bytecode is kept, as users have it, and XLA has no
    flags, such as more devices than a core."""
    left_out = ("PYTHONDONTWRITEBYTECODE", "XLA_FLAGS")
    kept = {n: v for n, v in os.environ.items() if n not in left_out}
    return kept | {"PYTHONPATH": str(REPOSITORY)}


def job_of(side: Side, what: str, shape: Shape) -> dict[str, Any]:
    """The whole job of a worker.

    Raises:
        ValueError: for a peer without a checkout.
    """
    directories = {"mdlm": _MDLM.value, "bd3lms": _BD3LMS.value}
    job = {"what": what, "shape": shape._asdict(), "core": max(os.sched_getaffinity(0))}
    job |= {"steps": STEPS, **side.job}
    if side.job["side"] in directories:
        directory = directories[side.job["side"]]
        if not directory or not pathlib.Path(directory, "diffusion.py").is_file():
            raise ValueError(f"--{side.job['side']}: no checkout at {directory}")
        job["directory"] = str(pathlib.Path(directory).resolve())
    return job


def take_turns(
    calls: dict[str, Callable[[], float]], options: command.Options
) -> dict[str, list[float]]:
    """Rounds of calls that return their own seconds."""
    spent = [0.0]

    def counted(name: str) -> None:
        seconds = calls[name]()
        print(f"{name}: {seconds:.3f} CPU s", file=sys.stderr, flush=True)
        spent[0] += seconds

    return command.interleaved(
        {name: lambda name=name: counted(name) for name in calls},
        rounds=options.rounds,
        seconds=options.seconds,
        clock=lambda: spent[0],
    )


def measure(
    what: str, sides: dict[str, Side], shape: Shape, options: command.Options
) -> dict[str, Any]:
    """Processor seconds of all sides, in turns."""
    workers, records = command.build_each(sides, lambda _, side: Worker(job_of(side, what, shape)))
    try:
        calls, of = {}, {}
        for side, worker in workers.items():
            for name in worker.first["calls"]:
                label = side.replace(REFERENCE, name) if name in SAMPLERS else side
                calls[label] = lambda worker=worker, name=name: worker.call(name)
                of[label] = side
        times = take_turns(calls, options)
        reference = times.get(REFERENCE)
        found = {name: r for name, r in records.items() if "unavailable" in r}
        for label, seconds in times.items():
            worker = workers[of[label]]
            found[label] = records[of[label]] | {
                "parameters": worker.first["parameters"],
                "seconds": command.summary(seconds),
                "peak_mib": worker.last["peak_mib"],
                "first_value": worker.first["first"].get("step"),
                "last_value": worker.last["value"],
            }
            if reference:  # time over time
                found[label]["over_library"] = command.ratios(seconds, reference)
        goals = [
            [first, second, most, command.ratios(times[first], times[second])]
            for first, second, most in GOALS.get((what, shape.name), ())
            if {first, second} <= set(times)
        ]
        return {"sides": found, "goals": goals}
    finally:
        for worker in workers.values():
            worker.close()


def table(record: dict[str, Any]) -> list[str]:
    """The record in Markdown."""

    def row(name: str, figures: dict[str, Any]) -> tuple[str, ...]:
        values = (figures["first_value"], figures["last_value"])
        return (
            f"{name} ({figures['summary']})",
            f"{figures['parameters']:,}",
            command.spread(figures["seconds"], 3),
            command.spread(figures.get("over_library")),
            f"{figures['peak_mib']:.0f}",
            "-" if values[0] is None else f"{values[0]:.2f} to {values[1]:.2f}",
        )

    header = ("side", "parameters", "CPU s", "over library", "peak MiB", "loss")
    lines = command.record_table(header, record["sides"], row)
    for first, second, most, ratio in record["goals"]:
        met = "met" if ratio["median"] <= most else "not met"
        lines.append(f"{first} / {second}: {command.spread(ratio)}, goal {most}: {met}")
    return lines


def first_steps(shape: Shape, options: command.Options) -> dict[str, Any]:
    """Processor seconds from the start of a process to the end of its first step, in turns."""
    sides = {"mdlm": TRAIN["mdlm"], "bd3lms": TRAIN["bd3lms"]}
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxy"), 300_000)
        (directory / "letters.txt").write_text("".join(letters), "utf-8")

        def ours(cold: bool) -> float:
            if cold:
                shutil.rmtree(directory / "cache", ignore_errors=True)
            return _first_step(shape, directory)

        def theirs(side: Side) -> float:
            worker = Worker(job_of(side, "training", shape) | {"warm": 0})
            worker.close()
            return worker.first["seconds"]

        jobs = {side: _available(sides[side], shape) for side in sides}
        calls = {name: lambda name=name: theirs(sides[name]) for name, ok in jobs.items() if ok}
        times: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            for name, call in {
                "library, cold": lambda: ours(True),
                "library, warm": lambda: ours(False),
                **calls,
            }.items():
                times.setdefault(name, []).append(call())
    return {"first_steps": {name: command.summary(seconds) for name, seconds in times.items()}}


def _available(side: Side, shape: Shape) -> bool:
    try:
        return bool(job_of(side, "training", shape))
    except ValueError:
        return False


def _first_step(shape: Shape, directory: pathlib.Path) -> float:
    """``mdm train``, until it says that the first step is done."""
    shutil.rmtree(directory / "run", ignore_errors=True)
    settings = {
        "data.source": "text",
        "data.path": directory / "letters.txt",
        "data.length": shape.length,
        "train.batch_size": shape.batch_size,
        "optimizer.name": "adamw",
        "variance.order": "('stratified',)",
        "model.width": shape.width,
        "model.depth": shape.depth,
        "model.num_heads": shape.num_heads,
    }
    process = start(
        [
            *("taskset", "-c", str(max(os.sched_getaffinity(0)))),
            *(sys.executable, "-m", "mdm_jax.launch", "train", "--config=quickstart:char"),
            *(f"--config.{name}={value}" for name, value in settings.items()),
            *(f"--workdir={directory / 'run'}", f"--compilation_cache_dir={directory / 'cache'}"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment() | {"PYTHONUNBUFFERED": "1"},
        text=True,
    )
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if "first step done" in line:
                fields = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rsplit(")")[-1]
                user_and_system = fields.split()[11:15]  # with those of ended children
                return sum(map(int, user_and_system)) / os.sysconf("SC_CLK_TCK")
    finally:
        process.kill()
        process.wait()
    raise RuntimeError(f"mdm train ended before its first step: {''.join(lines[-3:])}")


def first_step_table(record: dict[str, Any]) -> list[str]:
    """The record in Markdown."""
    rows = [
        (name, command.spread(figures), f"{FIRST_STEP[name]:g}" if name in FIRST_STEP else "")
        for name, figures in record["first_steps"].items()
    ]
    return command.markdown(("first step from the start", "CPU s", "goal"), rows)


def _train(shape: Shape, options: command.Options) -> dict[str, Any]:
    return measure("training", command.choose(TRAIN, options.variants, SETS), shape, options)


def _on_s(run: Callable[[Shape, command.Options], dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    return lambda shape, options: run(shape, options) if shape.name == "S" else {}


def _sample(shape: Shape, options: command.Options) -> dict[str, Any]:
    return measure("sampling", SAMPLE, shape, options)


PARTS = {
    "training": command.Part("training", _train, table),
    "sampling": command.Part("sampling", _on_s(_sample), lambda r: table(r) if r else ["S alone"]),
    "first_step": command.Part(
        "first_step", _on_s(first_steps), lambda r: first_step_table(r) if r else ["S alone"]
    ),
}


def main(_: list[str]) -> None:
    """Run the parts of the command line."""
    unknown = set(_PARTS.value) - set(PARTS)
    if unknown:
        raise app.UsageError(f"--parts: unknown {sorted(unknown)}; known are {', '.join(PARTS)}")
    with ending_children():
        command.run([PARTS[name] for name in _PARTS.value])


if __name__ == "__main__":
    app.run(main)
