"""Rounds of a rewarded run: answers are written, rewarded, and stepped on."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax import alignment, distributed, files, rng, sharding, training
from mdm_jax.alignment import training as objectives
from mdm_jax.launch.alignment.experiment import AlignedExperiment, Round
from mdm_jax.launch.workdir import writing
from mdm_jax.training.loop import Panel
from mdm_jax.training.step import StepMetrics, TrainState, step_draw
from mdm_jax.types import Array, Batch

RECORDS = "answers"
"""Folder of a workdir with prompts, answers, rewards and passes ("steps"), a file for each logged
round."""

Step = Callable[[TrainState, Any], tuple[TrainState, StepMetrics]]


class Rounds:
    """One step of the loop: answers of the current policy, and ``inner_steps`` updates on them.

    Answers are a function of seed, step and parameters, so a resumed run writes the same ones. What
    the ratios of later updates are relative to is scored before the first one, by the draws of
    those updates. Reward, share of groups with a signal and skipped answers go to the metrics; the
    losses there are means over the updates of a round (:func:`over_updates`).

    ``answers``: those of the last update.
    """

    def __init__(
        self, experiment: AlignedExperiment, writer: training.MetricWriter, workdir: files.Path
    ):
        self._writer, self._directory = writer, workdir / RECORDS
        self._rewards: list[float] = []
        self.answers: alignment.Answers | None = None
        self.follow(experiment)

    def follow(self, experiment: AlignedExperiment) -> None:
        """Go on with another experiment: under another chain."""
        self._experiment = experiment
        by_rows = sharding.batch_sharding(experiment.mesh)
        values = functools.partial(_old_values, experiment)
        self._old = jax.jit(values, out_shardings=by_rows)

    def __call__(self, step: Step, state: TrainState, prompts: Batch) -> tuple:
        e, number = self._experiment, int(jax.device_get(state.step))
        answers = self.write(state, prompts, number)
        inner = e.settings.inner_steps
        before = None
        if inner > 1:  # all old values, before the first update takes the parameters
            before = [self._old(state, answers, number * inner + j, e.frozen) for j in range(inner)]
        metrics = []
        for j in range(inner):
            # A step of the loop is a round; its updates have draws of their own.
            state = self._at(state, number * inner + j)
            if before is not None:
                answers = answers._replace(old=before[j])
            state, of_update = step(state, answers)
            self.answers = answers
            metrics.append(of_update)
        return self._at(state, number + 1), over_updates(metrics)

    def shown(self) -> dict[str, str]:
        """Mean reward since the last call, for the terminal."""
        rewards, self._rewards = self._rewards, []
        return {"reward": f"{np.mean(rewards):.3f}"} if rewards else {}

    def _at(self, state: TrainState, step: int) -> TrainState:
        return state.replace(step=jax.device_put(np.int32(step), state.step.sharding))

    def write(self, state: TrainState, prompts: Batch, number: int) -> alignment.Answers:
        """Answers to the prompts, rewarded; placed."""
        e = self._experiment
        rows = Batch(*map(np.asarray, distributed.to_host(Batch(*prompts[:4]))))
        key = rng.stream(rng.step_key(e.config.seed, number), "rollout/sampler")
        made = e.answer(e.variables(state.params), rows, key)
        self._record(number, made)
        return e.placed(made.answers)

    def _record(self, number: int, made: Round) -> None:
        texts, found, weight = made.texts, made.rewards, made.rewards.weight
        total = max(weight.sum(), 1.0)
        live = np.asarray(alignment.has_signal(jnp.asarray(found.values), jnp.asarray(weight)))
        values = {
            "reward": float((weight * found.values).sum() / total),
            "solved": float((weight * (found.values >= 1)).sum() / total),
            "groups_with_signal": float(live.mean()),
            "answers_without_reward": float((weight == 0).sum()),
        }
        self._writer.record(number + 1, "reward", values)
        self._rewards.append(values["reward"])
        if not distributed.is_first() or (number + 1) % self._experiment.loop.log_every:
            return
        lines = [
            {
                "step": number + 1,
                "prompt": prompt,
                "answer": answer,
                "reward": float(reward) if counted else None,
                "steps": int(passes),
            }
            for (prompt, answer), reward, counted, passes in zip(
                texts, found.values.ravel(), weight.ravel(), made.passes
            )
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with writing(self._directory):
            self._directory.mkdir(exist_ok=True)
            files.write(self._directory / f"step-{number + 1}.jsonl", text)


def _old_values(
    e: AlignedExperiment, state: TrainState, answers: alignment.Answers, number: Array, frozen: Any
) -> Array:
    """The policy's values under the draw of an update."""
    draw = step_draw(e.config.seed, number, e.transform, state.variance, e.spec)
    apply_fn = e.policy_fn(e.config.seed, number)
    sharded = sharding.sharded_apply(apply_fn, e.mesh, sharding.LOGICAL_RULES)
    model_fn = functools.partial(sharded, e.policy_params(state.params, frozen))
    return objectives.policy_values(e.settings.method, model_fn, answers, draw, e.dataset.mask_id)


def over_updates(metrics: Sequence[StepMetrics]) -> StepMetrics:
    """The metrics of a round: means over its updates, and how many of them were skipped.

    A skipped update leaves no finite mean; the loop leaves such a round out of what it logs.
    """
    if len(metrics) == 1:
        return metrics[0]
    means = jax.tree.map(lambda *each: sum(each) / len(each), *metrics)
    return means._replace(
        skipped=sum(each.skipped for each in metrics),
        skipped_in_a_row=metrics[-1].skipped_in_a_row,
    )


class RewardPanel(NamedTuple):
    """A :class:`~mdm_jax.training.loop.Panel` that shows the reward of rounds beside another, which
    gets the answers of the round in place of its prompts."""

    rounds: Rounds
    panel: Panel

    def visit(self, step: int, state: TrainState, batch: Batch) -> None:
        del batch
        self.panel.visit(step, state, self.rounds.answers)

    def read(self, step: int, readings: Mapping[str, float]) -> dict[str, str]:
        return self.rounds.shown() | self.panel.read(step, readings)
