"""The study of preference and reward training, on a CPU.

  python -m experiments.alignment --workdir=runs/alignment

Small models (2 layers, width 64) of 4 x 4 Sudoku and of Countdown are trained to about half of the
answers right, then by each method on rewards of its own answers: equally many updates, prompts,
answers and forward passes, on the same prompts and with the same sampler noise for the same seed.
A model of short words is trained on pairs of them, labelled by a known reward, the number of a
motif. The same command goes on where it was stopped: each run leaves a file in DIR/parts; the
tables are in DIR/tables.md. --minutes ends it after the run that is going on then.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from mdm_jax import alignment, data, evaluation, files, rng, training
from mdm_jax.alignment import rewards, rollout
from mdm_jax.launch import presets
from mdm_jax.launch.alignment.experiment import AlignedExperiment, aligned
from mdm_jax.launch.alignment.validation import HeldOutPairs
from mdm_jax.launch.build import Experiment, make_experiment
from mdm_jax.launch.modes import train
from mdm_jax.launch.workdir import WorkdirError, claim
from mdm_jax.types import Batch, PyTree

SEEDS = range(5)
UPDATES, BATCH, ANSWERS, PASSES = 30, 64, 8, 6
"""Of a rewarded run: updates, answers of one, answers to a prompt, passes that score an answer."""
RATE = 1e-3
HELD_OUT = 512
"""Held-out prompts, answered once with the same noise under all parameters."""
TASKS = {
    "sudoku": {"name": "sudoku"},
    "countdown": {"name": "countdown", "countdown": {"numbers": 3, "largest": 9}},
}
TARGET, OFTEN, MOST = 0.45, 200, 3000
"""Share of right answers that ends the training before, which is looked at so often; most steps,
and those of the model of words."""
WORD_STEPS = 400
REPLICATES = {"trace": 6, "elbo": 6, "espo": 3, "d1": 6, "rejection": 6}
"""Draws of an answer, so that all methods take :data:`PASSES` passes."""
LOSSES = {
    "dpo, cross-fitted": {"estimate": "crossfitted", "replicates": 2},
    "dpo, plain": {"estimate": "plain", "replicates": 2},
    "ipo, cross-fitted": {"method": "ipo", "estimate": "crossfitted", "replicates": 2},
}
PAIRS, PAIR_UPDATES, LETTERS, MOTIF, WORD = 600, 60, "abcd", "ab", 12


def shared(config: ConfigDict) -> ConfigDict:
    """Model, sampler and optimiser of all runs."""
    config.model.update(width=64, depth=2, num_heads=4)
    config.sample.update(sampler="first_hitting", num_samples=1, num_answers=HELD_OUT)
    config.evaluate.update(batch_size=BATCH, max_rows=HELD_OUT)
    config.train.update(batch_size=BATCH, prefetch=0)
    return config


def start_config(name: str, directory: pathlib.Path) -> ConfigDict:
    """The model that training on rewards or pairs starts from."""
    config = shared(presets.get_config("quickstart:char"))
    config.train.steps = MOST
    config.optimizer.update(name="adamw", peak=3e-3, final_fraction=1.0, ema_decay=0.0)
    if name in TASKS:
        config.data.source = "task"
        of_task(config, name)
    else:
        config.data.update(source="jsonl", path=str(directory / "words.jsonl"))
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
    experiment = make_experiment(config)
    step, seed = jax.jit(experiment.step, donate_argnums=0), experiment.placed_seed()
    state, share = experiment.initial_state(), 0.0
    with contextlib.closing(experiment.train_batches()) as batches:
        for number in range(1, (MOST if name in TASKS else WORD_STEPS) + 1):
            state, _ = step(state, next(batches), seed)
            if name in TASKS and number % OFTEN == 0:
                share = accuracy(experiment, experiment.generate, state.params)
                print(f"{name}: {share:.3f} right after {number} steps", flush=True)
                if share >= TARGET:
                    break
    claim(workdir, experiment.config)
    experiment.dataset.tokenizer.save(workdir / "tokenizer.json")
    checkpoints = training.Checkpoints(workdir / "checkpoints")
    checkpoints.save(number, state, {}, {})
    checkpoints.close()
    files.write_json(workdir / "accuracy.json", {"accuracy": share, "steps": number})
    return workdir


def aligned_config(name: str, start: files.Path) -> ConfigDict:
    config = shared(presets.get_config("reward" if name in TASKS else "preference"))
    config.train.update(steps=UPDATES, init_from=str(start))
    config.optimizer.update(peak=RATE, final_fraction=1.0, warmup_steps=min(4, UPDATES // 2))
    config.data.tokenizer = "char"
    if name in TASKS:
        of_task(config, name)
        config.alignment.answers = ANSWERS
    return config


class Step:
    """A run, and its step compiled once for all seeds: ``step(state, batch, seed)``."""

    def __init__(self, experiment: AlignedExperiment):
        self.experiment, self._step = experiment, jax.jit(experiment.step, donate_argnums=0)
        self._sharding = experiment.placed_seed().sharding

    def __call__(self, state: Any, batch: Any, seed: int) -> Any:
        placed = jax.device_put(np.uint32(seed), self._sharding)
        return self._step(state, batch, placed, self.experiment.frozen)


def draw_prompts(experiment: AlignedExperiment, seed: int, number: int) -> Batch:
    """Prompts of an update: the same for all methods."""
    generator = np.random.default_rng([seed, number])
    return data.sample_rows(experiment.dataset.train, experiment.rows_of_data, generator)


def accuracy(experiment: Experiment, write: Callable[..., Any], params: PyTree) -> float:
    """Share of held-out prompts that ``write(params, key, canvas, documents, first)`` answers
    right."""
    key, dataset, found = jax.random.key(1), experiment.dataset, []
    for first in range(0, HELD_OUT, BATCH):
        rows = data.gather(dataset.test, np.arange(first, first + BATCH))
        canvas = rollout.prompts_to_answer(rows, 1, dataset.mask_id)
        tokens = write(params, key, canvas.tokens, canvas.documents, np.int32(first))
        texts = rollout.texts(canvas, np.asarray(tokens), dataset.tokenizer)
        found.append(rewards.score(dataset.check, texts, 1).values)
    return float(np.mean(np.concatenate(found)))


def rewarded_run(step: Step, seed: int) -> dict[str, Any]:
    """Accuracy after the updates of one seed, and rewards on the way."""
    experiment = step.experiment
    state, found = fresh_state(experiment), {"reward": []}
    for number in range(UPDATES):
        key = rng.stream(rng.step_key(seed, number), "rollout")
        made = experiment.answer(state.params, draw_prompts(experiment, seed, number), key)
        found["reward"].append(float(made.rewards.values.mean()))
        state, _ = step(state, experiment.placed(made.answers), seed)
    found["accuracy"] = accuracy(experiment, experiment.generate, state.params)
    return found | {"skipped": int(state.skipped)}


def fresh_state(experiment: AlignedExperiment) -> Any:
    return experiment.initial_state(jax.tree.map(lambda a: a + 0, start_of(experiment)))


@functools.cache
def start_of(experiment: AlignedExperiment) -> PyTree:
    return train.initial_state(experiment).params


# --- preferences ----------------------------------------------------------------------------------


def words(count: int, seed: int) -> list[str]:
    """Words of a Markov chain: a letter is repeated, or the next one, or any."""
    generator, made = np.random.default_rng(seed), []
    for _ in range(count):
        letters = [int(generator.integers(4))]
        while len(letters) < WORD:
            moves = [letters[-1], (letters[-1] + 1) % 4, int(generator.integers(4))]
            letters.append(moves[generator.choice(3, p=[0.4, 0.3, 0.3])])
        made.append("".join(LETTERS[letter] for letter in letters))
    return made


def true_reward(_prompt: str, answer: str) -> float:
    """Number of the motif."""
    return float(answer.count(MOTIF))


def write_words(directory: pathlib.Path) -> None:
    """Words to train on, and pairs of words labelled by Bradley and Terry's law of the reward."""
    if (directory / "pairs.jsonl").exists():
        return
    lines = [{"prompt": ">", "answer": word} for word in words(4000, 0)]
    files.write(directory / "words.jsonl", "".join(json.dumps(each) + "\n" for each in lines))
    generator, pairs = np.random.default_rng(1), []
    for first, second in zip(words(PAIRS, 2), words(PAIRS, 3)):
        margin = true_reward("", first) - true_reward("", second)
        if first != second:
            better = generator.random() < 1 / (1 + np.exp(-margin))
            chosen, rejected = (first, second) if better else (second, first)
            pairs.append({"prompt": ">", "chosen": chosen, "rejected": rejected})
    files.write(directory / "pairs.jsonl", "".join(json.dumps(each) + "\n" for each in pairs))


def preferred_run(step: Step, seed: int) -> dict[str, Any]:
    """Held-out preferences, and the true reward of the model's own words, after the updates."""
    experiment = step.experiment
    state = fresh_state(experiment)
    for number in range(PAIR_UPDATES):
        generator = np.random.default_rng([seed, number])
        rows = data.sample_rows(experiment.dataset.train, experiment.rows_of_data, generator)
        state, _ = step(state, experiment.placed(rows), seed)
    key, reference = jax.random.key(2), experiment.frozen
    pairs = HeldOutPairs(experiment, "test", experiment.evaluate, key, reference)
    figures, _ = pairs.measure(state.params)
    return {
        "preference_accuracy": figures.accuracy.value,
        "preference_loss": figures.loss.value,
        "true_reward": reward_of_words(experiment, state.params),
    }


def reward_of_words(experiment: AlignedExperiment, params: PyTree) -> float:
    """Mean true reward of :data:`HELD_OUT` words of the model."""
    rows = data.gather(experiment.dataset.test, np.zeros(BATCH, int))
    canvas = rollout.prompts_to_answer(rows, 1, experiment.dataset.mask_id)
    found = []
    for first in range(0, HELD_OUT, BATCH):
        tokens = experiment.generate(
            params, jax.random.key(3), canvas.tokens, canvas.documents, np.int32(first)
        )
        texts = rollout.texts(canvas, np.asarray(tokens), experiment.dataset.tokenizer)
        found += [true_reward(*text) for text in texts]
    return float(np.mean(found))


# --- all runs -------------------------------------------------------------------------------------


def ways_of(name: str) -> Mapping[str, Any]:
    return REPLICATES if name in TASKS else LOSSES


def part(directory: pathlib.Path, name: str, way: str, seed: int) -> pathlib.Path:
    return directory / "parts" / f"{name}-{way.replace(', ', '-')}-{seed}.json"


def study(directory: pathlib.Path, minutes: float) -> bool:
    """Make what is missing, until the time is up; whether all is there."""
    end = time.monotonic() + 60 * minutes
    (directory / "parts").mkdir(parents=True, exist_ok=True)
    write_words(directory)
    names = (*TASKS, "words")
    starts = {name: pretrain(name, directory) for name in names}
    generators: dict[str, Any] = {}
    make = functools.cache(
        lambda name, way: compiled(name, way, starts[name], directory, generators)
    )
    for seed, name in itertools.product(SEEDS, names):
        for way in ways_of(name):
            path = part(directory, name, way, seed)
            if path.exists():
                continue
            if time.monotonic() > end:
                return False
            began, step = time.monotonic(), make(name, way)
            found = (rewarded_run if name in TASKS else preferred_run)(step, seed)
            before = directory / f"{name}-before.json"
            if not before.exists():
                files.write_json(files.as_path(before), {"value": value_of(step.experiment)})
            found["seconds"] = time.monotonic() - began
            files.write_json(files.as_path(path), found)
            print(f"{path.stem}: {found}", flush=True)
    return True


def value_of(experiment: AlignedExperiment) -> float:
    """What the tables show, of the model that runs start from."""
    params = start_of(experiment)
    if experiment.reward:
        return accuracy(experiment, experiment.generate, params)
    return reward_of_words(experiment, params)


def compiled(
    name: str, way: str, start: files.Path, directory: pathlib.Path, shared: dict[str, Any]
) -> Step:
    """The step of a method or loss; ``shared`` has the samplers that the first method compiled."""
    config = aligned_config(name, start)
    if name in TASKS:
        config.alignment.update(method=way, replicates=REPLICATES[way])
        experiment = aligned(make_experiment(config))
        own = {"rollout": experiment.rollout, "generate": experiment.generate}
        return Step(dataclasses.replace(experiment, **shared.setdefault(name, own)))
    config.alignment.update(LOSSES[way])
    config.data.path = str(directory / "pairs.jsonl")
    config.data.update(fractions=(0.6, 0.0, 0.4), tokenizer=str(start / "tokenizer.json"))
    experiment = aligned(make_experiment(config))
    own = {"generate": experiment.generate}
    shared = shared.setdefault(name, own)
    return Step(dataclasses.replace(experiment, frozen=start_of(experiment), **shared))


def tables(directory: pathlib.Path) -> str:
    """Markdown of what is there: means over seeds, and gains over the start with intervals."""
    lines = []
    for name in (*TASKS, "words"):
        quantity = "accuracy" if name in TASKS else "true_reward"
        before_after = f"{quantity}: before | after"
        lines += [
            f"| {name} | policy gradient | seeds | {before_after} | gain, 95 % interval |",
            "|---|---|---|---|---|---|",
        ]
        for way in ways_of(name):
            paths = [part(directory, name, way, seed) for seed in SEEDS]
            after = [json.loads(p.read_text())[quantity] for p in paths if p.exists()]
            if len(after) < 2:
                continue
            before = json.loads((directory / f"{name}-before.json").read_text())["value"]
            paired = evaluation.paired_seeds(after, [before] * len(after))
            label = alignment.METHODS[way].policy_gradient if name in TASKS else "none"
            low, high = paired.student
            lines.append(
                f"| {way} | {label} | {len(after)} | {before:.3f} | {np.mean(after):.3f} "
                f"| {paired.mean:+.3f} ({low:+.3f} to {high:+.3f}){' *' * paired.significant} |"
            )
        lines.append("")
    return "\n".join(lines)


def main(_argv: list[str]) -> None:
    directory = pathlib.Path(flags.FLAGS.workdir)
    done = study(directory, flags.FLAGS.minutes)
    text = tables(directory)
    files.write(files.as_path(directory / "tables.md"), text)
    print(text + ("" if done else "\nnot finished: the same command goes on"))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of the study; made if missing.", required=True)
    flags.DEFINE_float("minutes", 1e9, "It stops after the run that is going on then.")
    app.run(main)
