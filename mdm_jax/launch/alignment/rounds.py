"""Rounds of a rewarded run: answers are written, rewarded, and stepped on."""

import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax import alignment, distributed, files, rng, sharding, training
from mdm_jax.alignment import rewards as reward_functions
from mdm_jax.alignment import rollout as rollouts
from mdm_jax.alignment import training as objectives
from mdm_jax.launch.alignment.experiment import AlignedExperiment
from mdm_jax.training.step import StepMetrics, TrainState, step_draw
from mdm_jax.types import Array, Batch

RECORDS = "answers.jsonl"
"""File of a workdir: prompts, answers, rewards and steps, of the rounds that are logged."""

Step = Callable[[TrainState, Any], tuple[TrainState, StepMetrics]]


class Rounds:
    """One step of the loop: answers of the current policy, and ``inner_steps`` updates on them.

    Answers are a function of seed, step and parameters, so a resumed run writes the same ones. What
    the ratios of later updates are relative to is scored before the first one, by the draws of
    those updates. Reward, share of groups with a signal and skipped answers go to the metrics.
    """

    def __init__(
        self, experiment: AlignedExperiment, writer: training.MetricWriter, workdir: files.Path
    ):
        self._experiment, self._writer = experiment, writer
        self._path, self._codec = workdir / RECORDS, experiment.dataset.tokenizer
        self._by_rows = sharding.batch_sharding(experiment.mesh)
        self._old = jax.jit(self._old_values)

    def __call__(self, step: Step, state: TrainState, prompts: Batch) -> tuple:
        e, number = self._experiment, int(jax.device_get(state.step))
        answers = self.write(state, prompts, number)
        inner = e.settings.inner_steps
        before = None
        if inner > 1:  # all old values, before the first update takes the parameters
            before = [self._old(state, answers, number * inner + j, e.frozen) for j in range(inner)]
        metrics = None
        for j in range(inner):
            # A step of the loop is a round; its updates have draws of their own.
            state = self._at(state, number * inner + j)
            if before is not None:
                answers = answers._replace(old=jax.device_put(before[j], self._by_rows))
            state, metrics = step(state, answers)
        return self._at(state, number + 1), metrics

    def _at(self, state: TrainState, step: int) -> TrainState:
        return state.replace(step=jax.device_put(np.int32(step), state.step.sharding))

    def write(self, state: TrainState, prompts: Batch, number: int) -> alignment.Answers:
        """Answers to the prompts, rewarded; placed."""
        e, s = self._experiment, self._experiment.settings
        rows = Batch(*map(np.asarray, distributed.to_host(Batch(*prompts[:4]))))
        canvas = rollouts.prompts_to_answer(rows, s.answers, e.dataset.mask_id)
        key = rng.stream(rng.step_key(e.config.seed, number), "rollout/sampler")
        placed = sharding.place_batch(canvas, self._by_rows)
        written = e.rollout(e.variables(state.params), key, placed.tokens, placed.documents)
        tokens, steps = map(np.asarray, distributed.to_host(written))
        texts = rollouts.texts(canvas, tokens, self._codec)
        found = reward_functions.score(e.reward, texts, s.answers, skip=s.on_error == "skip")
        factors = reward_functions.coefficients(s.method, s.advantages, found)
        self._record(number, texts, found, steps)
        eligible = canvas.eligible
        if s.tail == "masked":
            tokens, eligible = rollouts.hide_tail(
                tokens, eligible, self._codec.eos_id, e.dataset.mask_id
            )
        answers = alignment.Answers(
            tokens=tokens.astype(np.int32),
            eligible=eligible,
            documents=canvas.documents,
            units=np.array([len(text) for _, text in texts], np.int32),
            advantage=factors.values.reshape(-1).astype(np.float32),
            weight=factors.weight.reshape(-1).astype(np.float32),
            steps=steps.astype(np.int32),
        )
        return sharding.place_batch(answers, self._by_rows)

    def _record(
        self, number: int, texts: list, found: reward_functions.Rewards, steps: np.ndarray
    ) -> None:
        weight = found.weight
        total = max(weight.sum(), 1.0)
        live = np.asarray(alignment.has_signal(jnp.asarray(found.values), jnp.asarray(weight)))
        values = {
            "reward": float((weight * found.values).sum() / total),
            "solved": float((weight * (found.values >= 1)).sum() / total),
            "groups_with_signal": float(live.mean()),
            "answers_without_reward": float((weight == 0).sum()),
        }
        self._writer.record(number + 1, "reward", values)
        if not distributed.is_first() or (number + 1) % self._experiment.loop.log_every:
            return
        lines = [
            json.dumps(
                {
                    "step": number + 1,
                    "prompt": prompt,
                    "answer": answer,
                    "reward": float(reward) if counted else None,
                    "steps": int(taken.max()) + 1,
                },
                ensure_ascii=False,
            )
            for (prompt, answer), reward, counted, taken in zip(
                texts, found.values.ravel(), weight.ravel(), steps
            )
        ]
        kept = []
        for _, record in files.read_records(self._path) if self._path.exists() else ():
            if record["step"] <= number:  # those after it are of before a resume
                kept.append(json.dumps(record, ensure_ascii=False))
        files.write(self._path, "\n".join([*kept, *lines]) + "\n")

    def _old_values(
        self, state: TrainState, answers: alignment.Answers, number: Array, frozen: Any
    ) -> Array:
        """The policy's values under the draw of an update."""
        e = self._experiment
        draw = step_draw(e.config.seed, number, e.transform, state.variance, e.spec)
        apply_fn = e.policy_fn(e.config.seed, number)
        sharded = sharding.sharded_apply(apply_fn, e.mesh, sharding.LOGICAL_RULES)
        model_fn = functools.partial(sharded, e.policy_params(state.params, frozen))
        return objectives.policy_values(
            e.settings.method, model_fn, answers, draw, e.dataset.mask_id
        )
