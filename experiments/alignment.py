"""The study of preference and reward training, on a CPU.

  python -m experiments.alignment --workdir=runs/alignment

Small models (2 layers, width 64) of 4 x 4 Sudoku and of Countdown with two numbers are trained
until about half of the validation answers are right, then by each method on rewards of its own
answers: equally many updates, prompts, answers and forward passes, on the same prompts and with the
same sampler noise for the same seed. A model of short words is trained on pairs of them, labelled
by a known reward, and compared with the optimum, which is enumerated (:mod:`experiments.words`).
The same command goes on where it was stopped: each run leaves a file in DIR/parts; the tables are
in DIR/tables.md, their figures in DIR/results.json. --minutes ends it after the run that is going
on then; 0 trains the models that runs start from, and no more.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from experiments import words
from mdm_jax import alignment, data, files, rng, training
from mdm_jax.alignment import rewards, rollout
from mdm_jax.launch import presets
from mdm_jax.launch.alignment.experiment import AlignedExperiment, aligned
from mdm_jax.launch.alignment.validation import HeldOutPairs
from mdm_jax.launch.build import Experiment, make_experiment
from mdm_jax.launch.modes import train
from mdm_jax.launch.workdir import WorkdirError, claim
from mdm_jax.types import Batch, PyTree

SEEDS = range(5)
UPDATES, BATCH, ANSWERS, PASSES = 60, 32, 8, 2
"""Of a rewarded run: updates, answers of one, answers to a prompt, passes that score an answer."""
RATE = 3e-4
"""Chosen on seed 5: 1e-3 unlearns Sudoku."""
ROWS = 64
"""Of a step of the training before and on pairs; answered at once, of held-out prompts."""
HELD_OUT = 512
"""Prompts of the test split, answered once with the same noise under all parameters; and of the
validation split, which ends the training before."""
TASKS: dict[str, dict[str, Any]] = {
    "sudoku": {"name": "sudoku"},
    "countdown": {"name": "countdown", "countdown": {"numbers": 2, "largest": 20}},
}
TARGET, OFTEN, MOST = 0.45, 100, 12000
"""Share of right validation answers that ends the training before, which is looked at so often;
most steps."""
WORD_STEPS = 400


class Way(NamedTuple):
    """A method with its draws of an answer, so that all take :data:`PASSES` passes; ``in_order``:
    answers are written from left to right."""

    method: str
    replicates: int
    in_order: bool = False


WAYS = {
    "trace": Way("trace", 2),
    "trace, left to right": Way("trace", 2, in_order=True),
    "elbo": Way("elbo", 2),
    "espo": Way("espo", 1),
    "d1": Way("d1", 2),
    "rejection": Way("rejection", 2),
}
LOSSES: dict[str, dict[str, Any]] = {
    "dpo, cross-fitted": {"estimate": "crossfitted", "replicates": 2},
    "dpo, plain": {"estimate": "plain", "replicates": 2},
    "ipo, cross-fitted": {"method": "ipo", "estimate": "crossfitted", "replicates": 2},
}
BETA, PAIR_UPDATES = 1.0, 100
SHARED_PAIRS, SHARED_DRAWS = 16, 1024


def shared(config: ConfigDict) -> ConfigDict:
    """Model, sampler and optimiser of all runs."""
    config.model.update(width=64, depth=2, num_heads=4)
    config.sample.update(sampler="first_hitting", num_samples=1, num_answers=HELD_OUT)
    config.evaluate.update(batch_size=ROWS, max_rows=HELD_OUT)
    config.train.update(batch_size=ROWS, prefetch=0, monitors=())
    return config


def start_config(name: str, directory: pathlib.Path) -> ConfigDict:
    """The model that training on rewards or pairs starts from."""
    config = shared(presets.get_config("quickstart:char"))
    config.train.steps = MOST
    config.optimizer.update(final_fraction=1.0, ema_decay=0.0)  # Muon
    if name in TASKS:
        config.data.source = "task"
        of_task(config, name)
    else:
        config.optimizer.update(name="adamw", peak=3e-3)
        config.data.update(source="jsonl", **words.paths(directory, "words"))
    return config


def of_task(config: ConfigDict, name: str) -> None:
    for key, value in TASKS[name].items():
        if isinstance(value, dict):
            config.data.task[key].update(value)
        else:
            config.data.task[key] = value


def pretrain(name: str, directory: pathlib.Path) -> files.Path:
    """Train the model that runs start from, unless it is there; returns its workdir."""
    workdir, config = files.as_path(directory / name), start_config(name, directory)
    if (workdir / "accuracy.json").exists():
        return workdir
    if workdir.exists():
        raise WorkdirError(
            f"{workdir} holds no start of this study that was finished; remove it, or give another "
            "--workdir"
        )
    experiment, began = make_experiment(config), time.monotonic()
    step, seed = jax.jit(experiment.step, donate_argnums=0), experiment.placed_seed()
    state, share, valid = experiment.initial_state(), math.nan, experiment.dataset.valid
    with contextlib.closing(experiment.train_batches()) as batches:
        for number in range(1, (MOST if name in TASKS else WORD_STEPS) + 1):
            state, _ = step(state, next(batches), seed)
            if name in TASKS and number % OFTEN == 0:
                share = float(right(experiment, experiment.generate, state.params, valid).mean())
                print(f"{name}: {share:.3f} right after {number} steps", flush=True)
                if share >= TARGET:
                    break
    claim(workdir, experiment.config)
    experiment.dataset.tokenizer.save(workdir / "tokenizer.json")
    checkpoints = training.Checkpoints(workdir / "checkpoints")
    checkpoints.save(number, state, {}, {})
    checkpoints.close()
    record = {"steps": number, "seconds": time.monotonic() - began}
    if name in TASKS:
        record |= {"accuracy": share, "target": TARGET}
    files.write_json(workdir / "accuracy.json", record)
    return workdir


def aligned_config(name: str, start: files.Path) -> ConfigDict:
    config = shared(presets.get_config("reward" if name in TASKS else "preference"))
    config.train.update(steps=UPDATES, init_from=str(start))
    config.optimizer.update(peak=RATE, warmup_steps=min(4, UPDATES // 2))
    config.data.tokenizer = "char"
    if name in TASKS:
        of_task(config, name)
        config.alignment.answers = ANSWERS
        config.train.batch_size = BATCH
    return config


class Step:
    """A run, and its step compiled once for all seeds: ``step(state, batch, seed)``.

    ``write`` answers held-out prompts, by the sampler that all methods are compared by.
    """

    def __init__(self, experiment: AlignedExperiment, write: Callable[..., Any]):
        self.experiment, self.write = experiment, write
        self._step = jax.jit(experiment.step, donate_argnums=0)
        self._sharding = experiment.placed_seed().sharding

    def __call__(self, state: Any, batch: Any, seed: int) -> Any:
        placed = jax.device_put(np.uint32(seed), self._sharding)
        return self._step(state, batch, placed, self.experiment.frozen)


def draw_prompts(experiment: AlignedExperiment, seed: int, number: int) -> Batch:
    """Prompts of an update: the same for all methods."""
    generator = np.random.default_rng([seed, number])
    return data.sample_rows(experiment.dataset.train, experiment.rows_of_data, generator)


def right(
    experiment: Experiment, write: Callable[..., Any], params: PyTree, source: data.RowSource
) -> np.ndarray:
    """1 where ``write(params, key, canvas, documents, first)`` answers a prompt right, else 0, of
    the first :data:`HELD_OUT` of ``source``."""
    key, dataset, found = jax.random.key(1), experiment.dataset, []
    for first in range(0, HELD_OUT, ROWS):
        rows = data.gather(source, np.arange(first, first + ROWS))
        canvas = rollout.prompts_to_answer(rows, 1, dataset.mask_id)
        tokens = write(params, key, canvas.tokens, canvas.documents, np.int32(first))
        texts = rollout.texts(canvas, np.asarray(tokens), dataset.tokenizer)
        found.append(rewards.score(dataset.check, texts, 1).values)
    return np.concatenate(found)[:, 0]


def measured(step: Step, params: PyTree, before: Any) -> dict[str, Any]:
    """What the tables are made of, of parameters; ``before``: of those that runs start from."""
    e = step.experiment
    if e.reward:
        ways = {"right": step.write}
        if e.generate is not step.write:
            ways["right_own"] = e.generate
        found = {name: right(e, write, params, e.dataset.test) for name, write in ways.items()}
        return {name: "".join(f"{value:.0f}" for value in each) for name, each in found.items()}
    pairs = HeldOutPairs(e, "test", e.evaluate, jax.random.key(2), e.frozen)
    figures, _ = pairs.measure(params)
    law = words.log_law(e, params)
    return {
        "preference_accuracy": figures.accuracy.value,
        "preference_loss": figures.loss.value,
        **words.figures(law, law if before is None else np.array(before["law"]), BETA),
        "law": law.tolist() if before is None else None,
    }


def rewarded_run(step: Step, seed: int) -> tuple[Any, dict[str, Any]]:
    """Parameters after the updates of one seed, and rewards on the way."""
    experiment = step.experiment
    state, found = fresh_state(experiment), []
    for number in range(UPDATES):
        key = rng.stream(rng.step_key(seed, number), "rollout")
        made = experiment.answer(state.params, draw_prompts(experiment, seed, number), key)
        found.append(float(made.rewards.values.mean()))
        state, _ = step(state, experiment.placed(made.answers), seed)
    return state.params, {"reward": found, "skipped": int(state.skipped)}


def preferred_run(step: Step, seed: int) -> tuple[Any, dict[str, Any]]:
    """Parameters after the updates of one seed."""
    experiment = step.experiment
    state = fresh_state(experiment)
    for number in range(PAIR_UPDATES):
        generator = np.random.default_rng([seed, number])
        rows = data.sample_rows(experiment.dataset.train, experiment.rows_of_data, generator)
        state, _ = step(state, experiment.placed(rows), seed)
    return state.params, {"skipped": int(state.skipped)}


def fresh_state(experiment: AlignedExperiment) -> Any:
    return experiment.initial_state(jax.tree.map(lambda a: a + 0, start_of(experiment)))


@functools.cache
def start_of(experiment: AlignedExperiment) -> PyTree:
    return train.initial_state(experiment).params


# --- all runs -------------------------------------------------------------------------------------


def ways_of(name: str) -> Mapping[str, Any]:
    return WAYS if name in TASKS else LOSSES


def named(way: str) -> str:
    return way.replace(", ", "-").replace(" ", "-")


def part(directory: pathlib.Path, name: str, way: str, seed: int) -> pathlib.Path:
    return directory / "parts" / f"{name}-{named(way)}-{seed}.json"


def before_path(directory: pathlib.Path, name: str, way: str) -> pathlib.Path:
    """Figures of what runs start from; of answers written in order beside the others."""
    in_order = name in TASKS and WAYS[way].in_order
    return directory / f"{name}-before{'-in-order' * in_order}.json"


def check_settings(directory: pathlib.Path) -> None:
    """Note what the runs of ``directory`` are made with; WorkdirError if others were made there."""
    path, settings = directory / "settings.json", [UPDATES, BATCH, ANSWERS, RATE, HELD_OUT]
    own = {"runs": settings, "tasks": TASKS, "starts": (TARGET, OFTEN, MOST, WORD_STEPS)}
    own |= {"ways": WAYS, "losses": LOSSES, "pairs": (BETA, PAIR_UPDATES, words.PAIRS)}
    own = json.loads(json.dumps(own))
    if (read(path) or own) != own:
        raise WorkdirError(
            f"{directory} holds runs of other settings ({path.name}); give another --workdir"
        )
    files.write_json(files.as_path(path), own)


def study(directory: pathlib.Path, minutes: float) -> bool:
    """Make what is missing, until the time is up; whether all is there."""
    end = time.monotonic() + 60 * minutes
    (directory / "parts").mkdir(parents=True, exist_ok=True)
    check_settings(directory)
    words.write(directory)
    names = (*TASKS, "words")
    starts = {name: pretrain(name, directory) for name in names}
    samplers: dict[str, Any] = {}
    make = functools.cache(lambda name, way: compiled(name, way, starts[name], directory, samplers))
    tasks = itertools.product(SEEDS, TASKS)  # all methods of a seed before the next
    for seed, name in [*tasks, *((seed, "words") for seed in SEEDS)]:
        for way in ways_of(name):
            path, before = part(directory, name, way, seed), before_path(directory, name, way)
            if path.exists():
                continue
            if time.monotonic() > end:
                return False
            step = make(name, way)
            if not before.exists():
                found = measured(step, start_of(step.experiment), None)
                files.write_json(files.as_path(before), found)
            began = time.monotonic()
            params, found = (rewarded_run if name in TASKS else preferred_run)(step, seed)
            found |= measured(step, params, json.loads(before.read_text()))
            found["seconds"] = time.monotonic() - began
            files.write_json(files.as_path(path), found)
            shown = {k: np.mean([*map(int, v)]) if "right" in k else v for k, v in found.items()}
            print(f"{path.stem}: {shown | {'reward': found.get('reward', [])[-3:]}}", flush=True)
            if name not in TASKS and not (directory / "sharing.json").exists():
                own = words.sharing(step.experiment, params, SHARED_PAIRS, SHARED_DRAWS)
                files.write_json(files.as_path(directory / "sharing.json"), own | {"of": path.stem})
    return True


def compiled(
    name: str, way: str, start: files.Path, directory: pathlib.Path, samplers: dict[str, Any]
) -> Step:
    """The step of a method or loss; ``samplers`` has those that were compiled."""
    config = aligned_config(name, start)
    if name not in TASKS:
        config.alignment.update({"beta": BETA} | LOSSES[way])
        config.data.update(words.paths(directory, "pairs"))
        config.data.tokenizer = str(start / "tokenizer.json")
        experiment = aligned(make_experiment(config))
        experiment = dataclasses.replace(experiment, frozen=start_of(experiment))
        return Step(experiment, experiment.generate)
    own = WAYS[way]
    config.alignment.update(method=own.method, replicates=own.replicates)
    if own.in_order:  # blocks of a token, one after the other
        config.sample.sampler = "random_remasking"
        config.sample.random_remasking.update(block_size=1, steps_per_block=1)
    experiment = aligned(make_experiment(config))
    key = f"{name}{', in order' * own.in_order}"
    both = {"rollout": experiment.rollout, "generate": experiment.generate}
    experiment = dataclasses.replace(experiment, **samplers.setdefault(key, both))
    if name not in samplers:  # those of answers in any order
        other = aligned(make_experiment(aligned_config(name, start)))
        samplers[name] = {"rollout": other.rollout, "generate": other.generate}
    return Step(experiment, samplers[name]["generate"])


# --- tables ---------------------------------------------------------------------------------------


class Gain(NamedTuple):
    """A mean over seeds of what training gained, and its standard errors: over seeds, over prompts,
    and of both together, with its degrees of freedom (Welch and Satterthwaite)."""

    mean: float
    over_seeds: float
    over_prompts: float
    error: float
    freedom: float


def gain(after: np.ndarray, before: np.ndarray) -> Gain:
    """Of right answers [S, P] of S seeds over those before [P].

    The error of both is the root of the sum of the two squared ones, which counts the noise of
    single answers twice: it is rather too large.
    """
    found = after - before
    seeds, prompts = (
        float(found.mean(axis).std(ddof=1) / math.sqrt(found.shape[1 - axis])) for axis in (1, 0)
    )
    error = math.hypot(seeds, prompts)
    count, size = found.shape
    rest = seeds**4 / (count - 1) + prompts**4 / (size - 1)
    freedom = error**4 / rest if rest else math.inf
    return Gain(float(found.mean()), seeds, prompts, error, freedom)


def read(path: pathlib.Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def results(directory: pathlib.Path) -> dict[str, Any]:
    """The figures of all tables, of what is there."""
    found: dict[str, Any] = {"starts": {}, "sharing": read(directory / "sharing.json")}
    for name in (*TASKS, "words"):
        found["starts"][name] = read(directory / name / "accuracy.json")
        found[name] = {}
        for way in ways_of(name):
            runs = [read(part(directory, name, way, seed)) for seed in SEEDS]
            runs = [run for run in runs if run is not None]
            if len(runs) < 2:
                continue
            before = read(before_path(directory, name, way))
            of = _gains if name in TASKS else _words
            record = of(runs, before)
            found[name][way] = record | {
                "seeds": len(runs),
                "seconds": float(np.mean([run["seconds"] for run in runs])),
                "skipped": sum(run["skipped"] for run in runs),
            }
    return found


def _gains(runs: Sequence[dict[str, Any]], before: dict[str, Any]) -> dict[str, Any]:
    record = {}
    for quantity in before:
        after = np.array([[*map(int, run[quantity])] for run in runs], float)
        first = np.array([*map(int, before[quantity])], float)
        record[quantity] = {
            "before": float(first.mean()),
            "after": after.mean(1).tolist(),
            **gain(after, first)._asdict(),
        }
    return record


def _words(runs: Sequence[dict[str, Any]], before: dict[str, Any]) -> dict[str, Any]:
    best = words.optimum(np.array(before["law"]), BETA)
    record: dict[str, Any] = {"optimum": {"true_reward": float(np.exp(best) @ words.REWARDS)}}
    for quantity in ("preference_accuracy", "true_reward", "divergence", "words"):
        after = [run[quantity] for run in runs]
        error = float(np.std(after, ddof=1) / math.sqrt(len(after)))
        record[quantity] = {"before": before[quantity], "after": after, "over_seeds": error}
    return record


def tables(found: Mapping[str, Any]) -> str:
    """Markdown of :func:`results`."""
    lines = []
    for name in TASKS:
        lines += [
            f"| {name} | policy gradient | seeds | before | after | gain ± standard error "
            "(seeds, prompts) | 95 % interval |",
            "|---|---|---|---|---|---|---|",
        ]
        for way, record in found[name].items():
            label = alignment.METHODS[WAYS[way].method].policy_gradient
            shown = {"right": way, "right_own": f"{way}, written so"}
            for quantity, title in shown.items():
                if quantity in record:
                    lines.append(_gain_row(title, label, record["seeds"], record[quantity]))
        lines += [_start_line(name, found["starts"][name]), ""]
    lines += [
        "| words | seeds | pairs right | mean reward | KL(optimum, model), nats | share of words |",
        "|---|---|---|---|---|---|",
    ]
    for way, record in found["words"].items():
        if len(lines) and lines[-1].startswith("|---"):
            start = [record[q]["before"] for q in ("true_reward", "divergence", "words")]
            lines.append("| before | | 0.500 | {:.3f} | {:.3f} | {:.3f} |".format(*start))
        cells = [
            f"{np.mean(record[q]['after']):.3f} ± {record[q]['over_seeds']:.3f}"
            for q in ("preference_accuracy", "true_reward", "divergence", "words")
        ]
        lines.append(f"| {way} | {record['seeds']} | {' | '.join(cells)} |")
    if found["words"]:
        best = next(iter(found["words"].values()))["optimum"]["true_reward"]
        lines.append(f"| the optimum | | | {best:.3f} | 0 | 1 |")
    lines.append("")
    if found["sharing"]:
        lines += _sharing_table(found["sharing"])
    return "\n".join(lines)


def _gain_row(title: str, label: str, seeds: int, own: Mapping[str, Any]) -> str:
    from scipy import special  # slow to import

    mean, error = own["mean"], own["error"]
    reach = float(special.stdtrit(own["freedom"], 0.975)) * error
    star = " *" if mean > 2 * error else ""
    return (
        f"| {title} | {label} | {seeds} | {own['before']:.3f} | {np.mean(own['after']):.3f} "
        f"| {mean:+.3f} ± {error:.3f} ({own['over_seeds']:.3f}, {own['over_prompts']:.3f}){star} "
        f"| {mean - reach:+.3f} to {mean + reach:+.3f} |"
    )


def _start_line(name: str, start: Mapping[str, Any] | None) -> str:
    if start is None:
        return f"\n{name}: there is no model to start from yet"
    missed = start["accuracy"] < start["target"]
    return (
        f"\n{name}: trained before for {start['steps']} steps, {start['accuracy']:.3f} of the "
        "validation answers right"
        + (f": **the target of {start['target']} was not reached**" if missed else "")
    )


def _sharing_table(found: Mapping[str, Any]) -> list[str]:
    lines = [
        f"| variance of a pair's score, one draw ({found['of']}) | predicted | measured |",
        "|---|---|---|",
    ]
    for name, unit in (("shared", " nats²"), ("independent", " nats²"), ("factor", "")):
        predicted, value, error = found[name]
        lines.append(f"| {name} | {predicted:.4g}{unit} | {value:.4g} ± {error:.2g} |")
    return lines


def main(_argv: list[str]) -> None:
    directory = pathlib.Path(flags.FLAGS.workdir)
    done = study(directory, flags.FLAGS.minutes)
    found = results(directory)
    files.write_json(files.as_path(directory / "results.json"), found)
    files.write(files.as_path(directory / "tables.md"), tables(found))
    print(tables(found) + ("" if done else "\nnot finished: the same command goes on"))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of the study; made if missing.", required=True)
    flags.DEFINE_float("minutes", 1e9, "It stops after the run that is going on then.")
    app.run(main)
