"""Held-out preferences and rewards of a run, for validations and the final evaluation."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mdm_jax import alignment, data, files, training
from mdm_jax.alignment import rewards as reward_functions
from mdm_jax.alignment.methods import METHODS, Constant, per_answer, per_token
from mdm_jax.estimates import finite_or_none, standard_error_of_mean
from mdm_jax.evaluation.accuracy import answer_prompts
from mdm_jax.launch.alignment.settings import PREFERENCES
from mdm_jax.launch.build import Experiment
from mdm_jax.likelihood.estimators import Likelihood
from mdm_jax.rng import stream
from mdm_jax.types import Array, PyTree

REFERENCE = "reference"
"""Folder of a workdir with the parameters that a run of all parameters began from."""

Progress = Callable[[int], None] | None


def beta_of(experiment: Experiment) -> Constant:
    """``alignment.beta`` in the unit of the run's method."""
    s = experiment.config.alignment
    answers = METHODS[s.method].unit == alignment.per_answer(0).unit
    return (per_answer if answers else per_token)(s.beta)


def read_reference(experiment: Experiment, workdir: files.Path) -> PyTree:
    """The reference of a run, None where it has begun none or needs none.

    Frozen parameters where adapters are trained; CheckpointError if what was kept is damaged.
    """
    if experiment.config.alignment.method == "simpo":
        return None
    if experiment.adapter is not None:
        return experiment.with_frozen(workdir).frozen
    if not (workdir / REFERENCE).exists():
        return None
    kept = training.CheckpointReader(workdir / REFERENCE)
    try:
        restored = kept.restore_last({"params": experiment.abstract_state().params})
    finally:
        kept.close()
    return None if restored is None else restored.state["params"]


class HeldOutPairs:
    """Preference figures of a split, by a fixed likelihood estimator instead of the run's chain.

    Policy and reference are evaluated with one key, hence on the same masks; chosen and rejected
    answers with two. The key is the same in every validation, so differences between validations
    are not mask noise, and the reference is evaluated once.
    """

    def __init__(
        self,
        experiment: Experiment,
        split: str,
        estimate: Callable[..., Likelihood],
        key: Array,
        reference: PyTree,
    ):
        rows = {"valid": experiment.dataset.valid, "test": experiment.dataset.test}[split]
        self._experiment, self._estimate, self._reference = experiment, estimate, reference
        rejected = experiment.dataset.rejected[split]
        self._answers = ((key, rows), (stream(key, "rejected"), rejected))

    def _likelihoods(self, params: PyTree, progress: Progress) -> list[Likelihood]:
        e = self._experiment
        return [
            self._estimate(params, key, e.batches(rows, e.config.evaluate.max_rows), progress)
            for key, rows in self._answers
        ]

    @functools.cached_property
    def _of_reference(self) -> list[Likelihood]:
        return self._likelihoods(self._reference, None)

    def measure(
        self, params: PyTree, progress: Progress = None
    ) -> tuple[alignment.PreferenceFigures, Likelihood]:
        """Figures, and the likelihood of the chosen answers."""
        s, networks = self._experiment.config.alignment, [self._likelihoods(params, progress)]
        if self._reference is not None:
            networks.append(self._of_reference)
        nats = np.stack([[each.replicate_row_nats for each in answers] for answers in networks])
        tokens = np.stack([each.row_tokens for each in networks[0]])
        figures = alignment.preference_figures(
            -np.swapaxes(nats, 1, 2), tokens, s.method, beta_of(self._experiment), s.gap
        )
        return figures, networks[0][0]


def reward_of(experiment: Experiment) -> reward_functions.Reward:
    """The function of ``alignment.reward``, else the checker of the run's task."""
    place = experiment.config.alignment.reward
    return reward_functions.load_reward(place) if place else experiment.dataset.check


class RewardFigures(NamedTuple):
    """Rewards of one answer to each of N held-out prompts.

    Attributes:
        rewards, weight: [N]; 0 and 0 where the reward function failed (alignment.on_error=skip).
    """

    rewards: np.ndarray
    weight: np.ndarray

    def to_dict(self) -> dict[str, float | None]:
        """JSON values; the standard error is over prompts, the draw of their answers included."""
        used = self.rewards[self.weight > 0]
        mean, solved = (float(v.mean()) if len(used) else np.nan for v in (used, used >= 1))
        return {
            "reward": finite_or_none(mean),
            "reward_standard_error": finite_or_none(standard_error_of_mean(used)),
            "solved": finite_or_none(solved),
            "rewarded_answers": float(len(used)),
            "answers_without_reward": float(np.sum(self.weight == 0)),
        }


def measure_rewards(
    experiment: Experiment,
    reward: reward_functions.Reward,
    source: data.RowSource,
    generate: Callable[..., Any],
    params: PyTree,
    key: Array,
    progress: Progress = None,
) -> RewardFigures:
    """Rewards of ``sample.num_answers`` rows of a split, answered once by the run's sampler.

    RewardError as in training.
    """
    c, dataset = experiment.config, experiment.dataset
    rows = min(c.sample.num_answers or len(source), len(source))
    size = min(c.evaluate.batch_size, rows)
    batches = data.evaluation_batches(source, size, rows, data.gather_together)
    found = answer_prompts(
        generate, params, key, batches, tokenizer=dataset.tokenizer, progress=progress
    )
    skip = c.alignment.on_error == "skip"
    scored = reward_functions.score_together(reward, list(zip(*found[:2])), 1, skip=skip)
    return RewardFigures(scored.values[:, 0], scored.weight[:, 0])


class Validation(NamedTuple):
    """A validation of N pairs or prompts, for the metrics and for early stopping.

    Attributes:
        values: with "loss", by which the best parameters are chosen: the method's held-out loss per
            pair, or minus the held-out reward.
        losses, sizes: [N] of each row.
    """

    values: dict[str, float]
    losses: np.ndarray
    sizes: np.ndarray


def validator(
    experiment: Experiment, generate: Callable[..., Any]
) -> Callable[[PyTree, Progress], Validation]:
    """``validate(params, progress) -> Validation`` on the validation split, for training."""
    valid = experiment.dataset.valid
    if experiment.config.alignment.method in PREFERENCES:
        key = experiment.key(0, "evaluate")
        reference = None if experiment.config.alignment.method == "simpo" else experiment.frozen
        pairs = HeldOutPairs(experiment, "valid", experiment.validate, key, reference)

        def of_pairs(params: PyTree, progress: Progress) -> Validation:
            figures, chosen = pairs.measure(params, progress)
            record = figures.to_dict()
            bits = chosen.bits_per_unit, chosen.standard_error_bits_per_unit
            values = {
                "loss": record["preference_loss"],
                **record,
                "bits_per_unit": bits[0],
                "bits_per_unit_standard_error": bits[1],
            }
            return Validation(_plain(values), figures.losses, np.ones_like(figures.losses))

        return of_pairs
    reward = reward_of(experiment)

    def of_answers(params: PyTree, progress: Progress) -> Validation:
        key = experiment.key(0, "held-out answers")
        found = measure_rewards(experiment, reward, valid, generate, params, key, progress)
        record = found.to_dict()
        loss = -np.nan if record["reward"] is None else -record["reward"]
        return Validation(_plain({"loss": loss, **record}), -found.rewards, found.weight)

    return of_answers


def _plain(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: np.nan if value is None else value for name, value in values.items()}


def final_figures(
    experiment: Experiment,
    workdir: files.Path,
    params: PyTree,
    generate: Callable[..., Any],
    progress: Progress = None,
) -> dict[str, Any]:
    """Of the final split, for ``evaluation.json``; {} without a method, or before it began."""
    c, (split, source) = experiment.config, experiment.held_out
    if not c.alignment.method:
        return {}
    if c.alignment.method not in PREFERENCES:
        key = experiment.key(0, "final answers")
        reward = reward_of(experiment)
        return measure_rewards(
            experiment, reward, source, generate, params, key, progress
        ).to_dict()
    reference = read_reference(experiment, workdir)
    if reference is None and c.alignment.method != "simpo":
        return {}
    estimate = experiment.family.likelihood(c.evaluate.final_passes, c.evaluate.final_replicates)
    pairs = HeldOutPairs(experiment, split, estimate, experiment.key(0, "final"), reference)
    return pairs.measure(params, progress)[0].to_dict()
