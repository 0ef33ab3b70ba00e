"""``mdm tune-levels``: settings of noise levels by training, the grid of each by samples."""

import copy
import json
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from mdm_jax import files
from mdm_jax.launch import command_line
from mdm_jax.launch.build import make_experiment
from mdm_jax.launch.modes import sweep, train
from mdm_jax.launch.spacing import compare
from mdm_jax.launch.start import scaled
from mdm_jax.launch.start.optimizer import learning_rate
from mdm_jax.launch.tune import report, search
from mdm_jax.launch.tune.search import Point, Range, Rung
from mdm_jax.launch.workdir import (
    WorkdirError,
    differences,
    provenance,
    read_config,
    resolved,
    writing,
)
from mdm_jax.training.loop import Interrupt, Interrupted

SPACE = (
    "gaussian.law=lognormal;gaussian.weighting=unit_output;"
    "gaussian.lognormal.mean=-2.4:1.2;gaussian.lognormal.std=0.6:2.4"
)
"""What is searched in Gaussian runs by default: EDM's law and weighting, centre and width."""

_TUNE = flags.DEFINE_string(
    "tune", None, 'tune-levels: settings and their ranges, "law.power.exponent=1:4;law.name=power".'
)
_BUDGET = flags.DEFINE_integer(
    "budget", None, "tune-levels: training steps in all; by default 10 times train.steps.", 1
)
_SEEDS = flags.DEFINE_integer(
    "paired_seeds", 3, "tune-levels: last runs of full length, of the start and of the best.", 2
)
OWN_FLAGS = ("mode", "workdir", "tune", "budget", "paired_seeds", "steps")
"""Flags that a command line to train has not, or reads otherwise."""
_RANGE = re.compile(r"(-?[\d.]+(?:e[+-]?\d+)?):(-?[\d.]+(?:e[+-]?\d+)?)")


class Plan(NamedTuple):
    """What a call does: ``fixed`` settings are those of every point but the start.

    ``runs``: rungs of the search, with the first seed; then each of ``seeds`` of ``steps`` steps.
    """

    ranges: Sequence[Range]
    fixed: Mapping[str, str]
    rungs: Sequence[Rung]
    steps: int
    seed: int
    seeds: Sequence[int]

    @property
    def total(self) -> int:
        """Runs in all."""
        return sum(rung.runs for rung in self.rungs) + 2 * len(self.seeds)

    def settings(self, point: Point) -> dict[str, str]:
        """Of a point, as written on a command line; {} for the start."""
        if not point:
            return {}
        return {r.name: f"{v:g}" for r, v in zip(self.ranges, point)} | dict(self.fixed)

    def describe(self) -> str:
        return (
            "search: "
            + ", then ".join(f"{rung.runs} runs of {rung.steps} steps" for rung in self.rungs)
            + f"; then the start and the best over {len(self.seeds)} seeds, {self.steps} steps each"
        )


Judge = Callable[[Point, int, int, bool], Mapping[str, Any]]
"""``judge(point, steps, seed, last)`` trains and searches the grid: {"distances": {number of
sampling steps: [R]}, ...}. ``last``: judged by the final split, else by validation rows."""


def run(config: ConfigDict, workdir: files.Path, arguments: Sequence[str], show=print) -> int:
    """Run the mode by its flags; the exit status. Raises as :func:`tune` and the launcher do.

    ``arguments``: the command line, for that which trains the best.
    """
    text = _TUNE.value or (SPACE if config.process == "gaussian" else "")
    if not text:
        raise ValueError(
            f"--tune is required for process={config.process!r}: settings and their ranges, as in "
            '--tune="law.name=power;law.power.exponent=1:4"'
        )
    made = plan(config, text, _BUDGET.value or 10 * config.train.steps, _SEEDS.value)
    known = {"config": resolved(config), "tune": text, "runs": made.describe()}
    claim(workdir, known)
    show(f"{made.describe()}\nbelow {workdir / 'runs'}")
    rest = command_line.without([*arguments[1:]], OWN_FLAGS)
    rest = rest[1:] if rest[:1] == ["tune-levels"] else rest
    with Interrupt() as interrupt:
        try:
            judge = Trainer(config, made, workdir, interrupt)
            record = tune(made, judge, show)
        except Interrupted:
            show("stopped; the same command line goes on where it was")
            return sweep.STOPPED
    record |= {"plan": known, "provenance": provenance(config.seed)}
    shown = report.write(record, [r.name for r in made.ranges], workdir)
    line = ["mdm", "train", *rest, "--workdir=NEW"]
    line += [f"--config.{name}={value}" for name, value in record["settings"].items()]
    show(f"{shown}\nwritten to {workdir / 'tune.md'}, tune.json, tune.png")
    if record["scores"] and record["scores"][report.BEST]["against_baseline"]["mean"] >= 0:
        show("full runs do not confirm what the search found: the start is not worse")
    show(f"to train the best:\n  {shlex.join(line)}")
    if record["best_run"]:
        show(f"one of its runs, with the grid found for it: {workdir / record['best_run']}")
    return 0


def plan(config: ConfigDict, text: str, budget: int, seeds: int) -> Plan:
    """Read ``--tune``; ValueError or TypeError for settings, values or budgets not allowed."""
    ranges, fixed = [], {}
    for part in filter(str.strip, text.split(";")):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        name = name.removeprefix("config.")
        if not equals or not value or name in {*fixed, *(r.name for r in ranges)}:
            raise ValueError(
                f"--tune: {part.strip()!r} is no NAME=LOW:HIGH or NAME=VALUE, or given twice; as in"
                ' --tune="gaussian.edm.mean=-2:0;gaussian.edm.std=0.6:2"'
            )
        if match := _RANGE.fullmatch(value):
            ranges.append(Range(name, float(match[1]), float(match[2])))
            if not ranges[-1].low < ranges[-1].high:
                raise ValueError(f"--tune: {part.strip()!r} is an empty range; write LOW:HIGH")
        else:
            fixed[name] = value
    if not ranges:
        raise ValueError(f"--tune={text!r} has no range to search, as in gaussian.edm.mean=-2:0")
    rungs = search.rungs(budget, config.train.steps, seeds)
    last = [config.seed + 1 + i for i in range(seeds)]
    made = Plan(tuple(ranges), fixed, tuple(rungs), config.train.steps, config.seed, tuple(last))
    learning_rate(scaled.filled(config))  # a warm-up that fits
    for end in ("low", "high"):  # refused here rather than after hours
        _config(config, made.settings(tuple(getattr(r, end) for r in ranges)))
    return made


def claim(workdir: files.Path, known: Mapping[str, Any]) -> None:
    """Write ``plan.json`` of a new workdir; WorkdirError where another plan, or a run, is."""
    path = workdir / "plan.json"
    if read_config(workdir) is not None:
        raise WorkdirError(f"{workdir} is a run of its own; name another --workdir")
    if not path.exists():
        with writing(path):
            workdir.mkdir(parents=True, exist_ok=True)
            files.write_json(path, known)
    elif lines := differences(files.read_json(path), json.loads(json.dumps(known))):
        raise WorkdirError(
            "\n  ".join([f"{workdir} was begun with another plan:", *lines])
            + "\ngo on with the same command line, or name another --workdir"
        )


def tune(plan: Plan, judge: Judge, show: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Search, then compare the best with the start over other seeds and the final split.

    Returns JSON values: "tried", "settings" of the best ({}: the start), "scores" by seed (a
    comparison of means of distances), by number of sampling steps in "by_steps".
    """
    done, begun = 0, time.monotonic()

    def judged(point: Point, steps: int, seed: int, last: bool) -> dict[int, np.ndarray]:
        nonlocal done
        found = judge(point, steps, seed, last)
        distances = {int(n): np.asarray(each) for n, each in found["distances"].items()}
        done += 1
        scores = ", ".join(f"{n} steps {np.mean(d):.4f}" for n, d in distances.items())
        show(
            f"[{done}/{plan.total}, {time.monotonic() - begun:.0f} s] {report.label(point)}, "
            f"{steps} training steps, seed {seed}: distance at {scores}"
        )
        return distances

    def evaluate(point: Point, steps: int) -> np.ndarray:
        return np.mean([*judged(point, steps, plan.seed, False).values()], axis=0)

    tried = search.halving(evaluate, plan.ranges, plan.rungs)
    point, final = search.best(tried).point, {}
    for seed in plan.seeds if point else ():
        for name, each in ((report.START, ()), (report.BEST, point)):
            final.setdefault(name, {})[seed] = judged(each, plan.steps, seed, True)
    return {
        "tried": [
            {"steps": t.steps, "point": t.point, "distances": t.distances.tolist()} for t in tried
        ],
        "settings": plan.settings(point),
        "best_run": f"runs/{_name(plan.steps, plan.seeds[0], point)}" if point else None,
        **report.compared(final),
    }


class Trainer:
    """The :data:`Judge` that trains in this process, each run in a workdir of its own below runs.

    What a finished run gave is read from its ``tuned.json``. Raises Interrupted where asked to.
    """

    def __init__(
        self, config: ConfigDict, plan: Plan, workdir: files.Path, interrupt: Interrupt
    ) -> None:
        self.config, self.plan, self.workdir, self.interrupt = config, plan, workdir, interrupt

    def __call__(self, point: Point, steps: int, seed: int, last: bool) -> Mapping[str, Any]:
        directory = self.workdir / "runs" / _name(steps, seed, point)
        path = directory / "tuned.json"
        if path.exists():
            return files.read_json(path)
        own = {"seed": str(seed)}
        own |= {} if last else {"evaluate.final_split": "valid"}
        config = _config(shortened(self.config, steps), own | self.plan.settings(point))
        experiment = make_experiment(config, directory)
        compare.check(experiment)
        if not train.train(experiment, directory, self.interrupt):
            raise Interrupted
        records = compare.judge(experiment, directory).records
        self.interrupt.check()
        grids = {r["num_steps"]: r["grids"][r["best"]]["distances"] for r in records}
        found = {"settings": dict(self.plan.settings(point)), "distances": grids}
        with writing(path):
            files.write_json(path, found)
        return json.loads(json.dumps(found))


def shortened(config: ConfigDict, steps: int) -> ConfigDict:
    """With ``steps`` steps; shorter runs warm up and average over at most the shares of the rules.

    Those are of ``launch.start.scaled``: a tenth and a fifth of the run. They are measured by their
    samples alone: without monitors, which read the law, all of a length share a compiled step.
    """
    if steps >= config.train.steps:
        return config
    config = copy.deepcopy(config)
    config.train.update(steps=steps, monitors=())
    config.panel.cost = 0.0
    for name in ("warmup_steps", "ema_decay"):
        if config.optimizer[name] is not None:
            rule = getattr(scaled, name)(steps)
            config.optimizer[name] = min(config.optimizer[name], rule)
    return config


def _config(config: ConfigDict, settings: Mapping[str, str]) -> ConfigDict:
    if not settings:
        return config
    given = ";".join(f"{name}={value}" for name, value in settings.items())
    made = sweep.plan(config, given, "--tune")
    if len(made) > 1:
        raise ValueError(f"--tune: a setting has several values: {dict(settings)}; give one")
    return made[0].config


def _name(steps: int, seed: int, point: Point) -> str:
    return f"{steps}-seed{seed}-{report.label(point).replace(' ', '_')}"
