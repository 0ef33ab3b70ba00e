"""The experiment of a run on preferences or rewards."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from mdm_jax import alignment, data, distributed, files, models, samplers, sharding, training
from mdm_jax.alignment import preference
from mdm_jax.alignment import rewards as reward_functions
from mdm_jax.alignment import rollout as rollouts
from mdm_jax.alignment import training as objectives
from mdm_jax.alignment.methods import METHODS, per_answer, per_token
from mdm_jax.alignment.surrogates import FREE_ORDERS
from mdm_jax.launch import config as launch_config
from mdm_jax.launch.alignment.settings import PREFERENCES
from mdm_jax.launch.alignment.validation import REFERENCE, beta_of, reward_of
from mdm_jax.launch.auto import chain as chains
from mdm_jax.launch.build import Experiment
from mdm_jax.launch.processes.parts import block_decoder, masked_sampler
from mdm_jax.launch.workdir import WorkdirError, changes
from mdm_jax.models import lora
from mdm_jax.training.loop import BatchStream
from mdm_jax.training.step import TrainState
from mdm_jax.types import Array, ArrayLike, Batch, PyTree
from mdm_jax.variance.transform import Phase, VarianceTransform

REWARDED = ("masked", "block", "uniform")
"""Processes whose answers can be rewarded; but for masked ones, by methods that score the run's own
bound."""


@dataclasses.dataclass(frozen=True, eq=False)
class AlignedExperiment(Experiment):
    """An :class:`Experiment` whose steps score policy and reference on the same masks.

    The reference is what the run began from: the frozen parameters, where adapters are trained.

    Attributes:
        base: the run as it is without the section ``alignment``.
        length: positions of a training row: two answers, or one.
        reward: of a text; None for preferences.
        rollout: as of ``alignment.make_rollout``; None for preferences.
    """

    base: Experiment | None = None
    length: int = 0
    reward: Callable[[str, str], float] | None = None
    rollout: Callable[..., alignment.Written] | None = None

    @property
    def settings(self) -> Any:
        return self.config.alignment

    @property
    def has_reference(self) -> bool:
        s = self.settings
        return s.kl > 0 if self.reward else s.method != "simpo"

    @property
    def lengths(self) -> tuple[int, ...]:
        return (self.length,)

    @property
    def rows_of_data(self) -> int:
        """Rows that a step takes from the data: pairs, or prompts."""
        size = self.spec.batch_size
        return size // self.settings.answers if self.reward else size

    def policy_fn(self, seed: ArrayLike, step: ArrayLike) -> Callable[..., Any]:
        """The network as answers are drawn from it: at the sampler's temperature, without tokens
        that it does not write."""
        apply_fn = super().apply_at(seed, step)
        if self.reward is None:
            return apply_fn
        drawn_from = alignment.at_temperature(apply_fn, self.config.sample.temperature)
        return models.without_tokens(drawn_from, self.dataset.absent_ids)

    def apply_at(
        self, seed: ArrayLike, step: ArrayLike, frozen: PyTree = None
    ) -> Callable[..., Any]:
        apply_fn, fixed = self.policy_fn(seed, step), [frozen] if self.has_reference else []
        return lambda params, *inputs: alignment.networks(apply_fn, params, *fixed)(*inputs)

    def train_batches(self) -> BatchStream:
        return super().train_batches(self.rows_of_data)

    def policy_params(self, params: PyTree, frozen: PyTree) -> PyTree:
        """What the network is applied to, of trained parameters."""
        return lora.join(frozen, params, self.adapter) if self.adapter else params

    def abstract_batch(self, length: int | None = None) -> Any:
        rows = super().abstract_batch(length)
        if not self.reward:
            return rows
        size, by_rows = self.spec.batch_size, sharding.batch_sharding(self.mesh)

        def rows_of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=by_rows)

        fields = [rows_of(field.shape[1:], field.dtype) for field in rows[:4]]
        number, old = rows_of((), np.float32), None
        if self.settings.inner_steps > 1:
            by_token = self.settings.method in objectives.TOKEN_SURROGATES
            old = rows_of((self.transform.views, *[self.length] * by_token), np.float32)
        return alignment.Answers(*fields, number, number, rows_of((self.length,), np.int32), old)

    @property
    def members(self) -> tuple[VarianceTransform, ...]:
        return self.base.members

    def repeated(self, transform: VarianceTransform) -> VarianceTransform:
        return alignment.replicated(transform, self.settings.replicates)

    def with_chain(self, chain: chains.Chain) -> "AlignedExperiment":
        if chain == self.chain:
            return self
        made = aligned(self.base.with_chain(chain))
        kept = {"frozen": self.frozen, "reward": self.reward, "rollout": self.rollout}
        return dataclasses.replace(made, **kept)

    def measured_rows(self, params: PyTree, count: int, step: int) -> Any:
        if not self.reward:
            return super().measured_rows(params, count, step)
        return self.written(params, count, step).answers

    def written(self, params: PyTree, count: int, step: int) -> "Round":
        """``count`` answers (a multiple of a prompt's) in batches as of the loop, by seed and step.

        ``params`` as of ``variables``.
        """
        group, size = self.settings.answers, self.rows_of_data
        prompts = super().measured_rows(params, -(-count // (group * size)) * size, step)
        key, made = self.key(step, "measured answers"), []
        for first in range(0, len(prompts.tokens), size):
            own = jax.tree.map(lambda field, i=first: np.asarray(field)[i : i + size], prompts)
            made.append(self.answer(params, own, key, first * group))
        answers, texts, rewards, passes = zip(*made)
        joined = [
            jax.tree.map(lambda *parts, n=n: np.concatenate(parts)[:n], *each)
            for each, n in ((answers, count), (rewards, count // group), (passes, count))
        ]
        every = [text for part in texts for text in part][:count]
        return Round(joined[0], every, *joined[1:])

    def answer(self, params: PyTree, prompts: Batch, key: Array, first_row: int = 0) -> "Round":
        """Answers of the policy to prompts on the host, with their rewards, on every host.

        ``params`` as of ``variables``; ``first_row``: number of the first answer, which its
        noise goes with.
        """
        s, codec, mask_id = self.settings, self.dataset.tokenizer, self.dataset.mask_id
        canvas = rollouts.prompts_to_answer(prompts, s.answers, mask_id)
        placed = self.placed(canvas)
        written = self.rollout(params, key, placed.tokens, placed.documents, np.int32(first_row))
        tokens, steps, passes = map(np.asarray, distributed.to_host(written))
        texts, skip = rollouts.texts(canvas, tokens, codec), s.on_error == "skip"
        found = reward_functions.score_together(self.reward, texts, s.answers, skip=skip)
        factors = reward_functions.coefficients(s.method, s.advantages, found)
        eligible = canvas.eligible
        if s.tail == "masked":
            tokens, eligible = rollouts.hide_tail(tokens, eligible, codec.eos_id, mask_id)
        answers = alignment.Answers(
            tokens=tokens.astype(np.int32),
            eligible=eligible,
            documents=canvas.documents,
            units=np.array([len(text) for _, text in texts], np.int32),
            advantage=factors.values.reshape(-1).astype(np.float32),
            weight=factors.weight.reshape(-1).astype(np.float32),
            steps=steps.astype(np.int32),
        )
        return Round(answers, texts, found, passes)

    def placed(self, rows: Any) -> Any:
        """Rows that every host holds, on the devices that split batches."""
        by_rows, size = sharding.batch_sharding(self.mesh), len(rows.tokens)
        own = sharding.local_rows(by_rows, size)
        local = jax.tree.map(lambda field: np.asarray(field)[own], rows)
        return sharding.place_batch(local, by_rows, size)

    def with_reference(self, state: TrainState, workdir: files.Path) -> "AlignedExperiment":
        """This run with its reference: that of ``workdir``, or new parameters, which are kept.

        WorkdirError if a trained run has lost it.
        """
        if not self.has_reference or self.frozen is not None:
            return self
        if int(jax.device_get(state.step)) and not (workdir / REFERENCE).exists():
            raise WorkdirError(
                f"{workdir / REFERENCE}, the parameters that the run began from, is missing: bring "
                "it back, or --restart to start anew"
            )
        kept = training.Checkpoints(workdir / REFERENCE, 1)
        try:
            if not kept.steps():
                kept.save(0, {"params": state.params}, {}, {})
                kept.wait()
            restored = kept.restore_last({"params": self.abstract_state().params})
        finally:
            kept.close()
        return dataclasses.replace(self, frozen=restored.state["params"])

    def policy_gradient_label(self, method: str) -> str:
        """That of ``METHODS``; traces are exact under orders that do not depend on the network."""
        if method == "trace" and self.config.sample.sampler not in FREE_ORDERS:
            return f"biased: the order of {self.config.sample.sampler} depends on the network"
        if method == "trace" and self.config.model.condition_on_logsnr:
            return "biased: the network reads a level, which a sampler sets otherwise"
        return METHODS[method].policy_gradient

    def describe_method(self) -> str:
        """One line with the method's labels, for the terminal."""
        s, method = self.settings, METHODS[self.settings.method]
        label = self.policy_gradient_label(s.method)
        scored = f"score {method.elbo} for the bound; policy gradient {label}"
        prompts = f"{self.rows_of_data} pairs" if not self.reward else (
            f"{self.rows_of_data} prompts of {s.answers} answers"
        )  # fmt: skip
        return f"alignment: {s.method} ({method.source}), {prompts} a step; {scored}"


class Round(NamedTuple):
    """Answers on the host, their (prompt, answer) texts, rewards, and passes [B] (``Written``)."""

    answers: alignment.Answers
    texts: list[tuple[str, str]]
    rewards: reward_functions.Rewards
    passes: np.ndarray


def aligned(experiment: Experiment) -> Experiment:
    """The experiment that trains what the section ``alignment`` describes; itself without method.

    ValueError for settings that contradict each other, or are not read.
    """
    c = experiment.config
    s, default = c.alignment, launch_config.get_config().alignment
    if not s.method:
        unread = [f"alignment.{name}={s[name]!r}" for name in s if s[name] != default[name]]
        if unread:
            raise ValueError(
                f"{', '.join(unread)} would not be read without alignment.method; set it, or leave "
                "them out"
            )
        if c.data.source == "preferences":
            raise ValueError(
                "data.source=preferences needs alignment.method: dpo, ipo, simpo or kto"
            )
        return experiment
    _check(experiment)
    rewarded = s.method not in PREFERENCES
    objective = (_policy if rewarded else _pairs)(experiment)
    # Refuses what is no bound.
    alignment.sequence_bound(
        experiment.objective, experiment.transform, allow_biased=s.allow_biased
    )
    transform = alignment.replicated(experiment.transform, s.replicates)
    if rewarded and s.method not in ("elbo", "rejection"):
        _check_no_warp(experiment.transform, s.method)
    length = data.gather(experiment.dataset.train, np.arange(1)).tokens.shape[1]
    reward, rollout = None, None
    if rewarded:
        reward = reward_of(experiment)
        rollout = _rollout(experiment)
    fields = {f.name: getattr(experiment, f.name) for f in dataclasses.fields(Experiment)}
    spec = objective.spec(experiment.spec.batch_size, length)
    own = fields | {
        "family": dataclasses.replace(experiment.family, objective=objective),
        "transform": transform,
        "spec": spec,
        "monitors": chains.monitors(c.train.monitors, c.monitors, objective, transform),
        "loop": dataclasses.replace(experiment.loop, views=transform.views, unit=""),
    }
    made = AlignedExperiment(**own, base=experiment, length=length, reward=reward, rollout=rollout)
    made.step  # noqa: B018  (checks the step's settings)
    return made


def with_reference(experiment: Experiment, state: TrainState, workdir: files.Path) -> Experiment:
    """``AlignedExperiment.with_reference``, and other experiments as they are."""
    if isinstance(experiment, AlignedExperiment):
        return experiment.with_reference(state, workdir)
    return experiment


def check_same_sampler(experiment: Experiment, workdir: files.Path, allow_change: bool) -> None:
    """Raise WorkdirError where a rewarded run goes on with answers of another sampler.

    Settings of the section ``sample`` are free elsewhere; here they are the policy.
    """
    if allow_change or not (isinstance(experiment, AlignedExperiment) and experiment.reward):
        return
    read = ("sampler", "num_steps", "grid", "temperature", experiment.config.sample.sampler)
    changed = [c for c in changes(workdir, experiment.config, ("sample",))
               if c.split(":")[0].split(".")[1] in read]  # fmt: skip
    if changed:
        raise WorkdirError(
            f"{workdir}: {'; '.join(changed)}: answers would be another policy's; leave it, or say "
            "--allow_config_change"
        )


def _pairs(experiment: Experiment) -> Any:
    s = experiment.config.alignment
    estimate = getattr(preference, s.estimate)
    if s.estimate == "crossfitted" and s.replicates < 2:
        raise ValueError(
            f"alignment.estimate=crossfitted needs alignment.replicates of 2 or more, got "
            f"{s.replicates}; or take alignment.estimate=plain"
        )
    loss = objectives.pair_loss(s.method, beta_of(experiment), gap=s.gap, estimate=estimate)
    return objectives.pair_objective(experiment.objective, loss, s.replicates)


def _policy(experiment: Experiment) -> Any:
    s = experiment.config.alignment
    ratio = s.method in (*objectives.SEQUENCE_SURROGATES, *objectives.TOKEN_SURROGATES)
    return objectives.policy_objective(
        experiment.objective,
        s.method,
        clip=(per_token(s.clip_low), per_token(s.clip_high)) if ratio else None,
        kl=per_answer(s.kl) if s.kl else None,
        mask_id=experiment.dataset.mask_id,
    )


def _rollout(experiment: Experiment) -> Callable[..., alignment.Written]:
    """The run's sampler, with the steps in which it writes, which only masked processes record."""
    c, dataset = experiment.config, experiment.dataset
    if c.sample.approximate_cache:
        raise ValueError(
            "rewarded answers are written by the network that is scored: leave out "
            f"sample.approximate_cache={c.sample.approximate_cache!r}"
        )
    if c.process == "uniform":  # whose samplers run the network once in every step

        def with_passes(*inputs: Any) -> tuple[Array, np.ndarray]:
            tokens = experiment.generate(*inputs)
            return tokens, np.full(len(tokens), c.sample.num_steps, np.int32)

        return alignment.without_steps(with_passes, dataset.mask_id)
    sampler, levels = masked_sampler(c, dataset)
    grid = None if sampler.num_steps is not None else levels(c.sample.grid, c.sample.num_steps)
    if c.process == "block":
        decoder = block_decoder(c, dataset, experiment.model)
        generate = samplers.make_block_generator(
            decoder, sampler, grid, mask_id=dataset.mask_id, with_passes=True
        )
        return alignment.without_steps(generate, dataset.mask_id)
    network = models.without_tokens(experiment.apply_fn, dataset.absent_ids)
    return alignment.make_rollout(network, sampler, grid, mask_id=dataset.mask_id)


def _check(experiment: Experiment) -> None:
    """Raise ValueError where settings of the run do not go with its method."""
    c = experiment.config
    s, wanted = c.alignment, "preferences" if c.alignment.method in PREFERENCES else ""
    if not (c.model.source or c.train.init_from):
        raise ValueError(
            f"alignment.method={s.method!r} starts from a trained model: give model.source=DIR, or "
            "train.init_from=WORKDIR of a run of your own"
        )
    if (c.data.source == "preferences") != bool(wanted):
        raise ValueError(
            f"alignment.method={s.method!r} trains on "
            + ("pairs, data.source=preferences" if wanted else "prompts, such as data.source=task")
            + f"; got data.source={c.data.source!r}"
        )
    if "clipped_adaptive" in c.variance.order:
        raise ValueError(
            "clipped_adaptive in variance.order is searched by the likelihood bound; take auto, or "
            "name the chain, as in --config.variance.order=\"('stratified',)\""
        )
    if experiment.adapter is not None and experiment.adapter.dropout:
        raise ValueError(
            f"adapter.dropout={experiment.adapter.dropout} would differ between policy and "
            "reference, as noise in every score: set it to 0"
        )
    if c.data.buckets or c.convert.anneal_steps or c.model.self_conditioning:
        raise ValueError(
            "alignment.method takes rows of one length and a network that is the same in every "
            "step: leave out data.buckets, convert.anneal_steps and model.self_conditioning"
        )
    if wanted:
        return
    if c.process not in REWARDED:
        raise ValueError(
            f"rewarded answers are written by process={' or '.join(REWARDED)}, whose samplers fill "
            f"in answers that the run's bound scores; got process={c.process!r}"
        )
    if experiment.dataset.tokenizer is None:
        raise ValueError(
            f"rewards are of texts, and data.source={c.data.source!r} has none; take "
            "data.source=task, task_file, jsonl or chat"
        )
    if experiment.dataset.check is None and not s.reward:
        raise ValueError(
            f"data.source={c.data.source!r} has no checker: give "
            "--config.alignment.reward=FILE.py:NAME, or take data.source=task or task_file"
        )
    if experiment.spec.batch_size % s.answers:
        raise ValueError(
            f"train.batch_size={experiment.spec.batch_size} is the number of answers of a step, "
            f"which alignment.answers={s.answers} must divide"
        )
    ways = experiment.mesh.shape["data"] * experiment.mesh.shape["fsdp"]
    prompts = experiment.spec.batch_size // s.answers
    if prompts % ways:
        raise ValueError(
            f"the {prompts} prompts of a step (train.batch_size over alignment.answers) must be a "
            f"multiple of the {ways} devices that split batches"
        )
    if c.sample.top_k or c.sample.top_p < 1 or c.sample.guidance or c.sample.no_repeat_ngrams:
        raise ValueError(
            "the policy that is scored must be the one that writes: leave out sample.top_k, top_p, "
            "guidance and no_repeat_ngrams (sample.temperature is scored too)"
        )
    ratio = (*objectives.SEQUENCE_SURROGATES, *objectives.TOKEN_SURROGATES)
    if s.inner_steps > 1 and s.method not in ratio:
        raise ValueError(
            f"alignment.inner_steps={s.inner_steps}: updates after the first need a ratio to the "
            f"old policy, which the methods {', '.join(ratio)} have; {s.method!r} has none"
        )
    views = s.replicates * experiment.transform.views
    wanted = {"spg": (views >= 2, "2 or more draws"), "gdpo": (views % 2 == 0, "pairs of draws")}
    enough, draws = wanted.get(s.method, (True, ""))
    if not enough:
        raise ValueError(
            f"alignment.method={s.method!r} takes {draws} of an answer, and has {views}: set "
            "alignment.replicates=2"
        )
    if s.method == "trace" and s.tail == "masked":
        raise ValueError(
            "alignment.method=trace scores the whole canvas: take alignment.tail=answer"
        )
    if s.on_error == "skip" and c.train.stop.patience:
        raise ValueError(
            "train.stop.patience pairs the rewards of validations by prompt, and "
            "alignment.on_error=skip leaves some out: take one of the two"
        )
    if c.train.noise_by == "example":
        raise ValueError("answers are new in every step: leave train.noise_by empty")


def _check_no_warp(transform: VarianceTransform, method: str) -> None:
    warps = [t.name for t in transform.members or (transform,) if t.phase == Phase.WARP]
    if warps:
        raise ValueError(
            f"alignment.method={method!r} chooses its own levels, which {warps[0]} in "
            "variance.order would warp: --config.variance.order=\"('stratified',)\""
        )
