"""``mdm variance`` of runs on preferences and rewards: where noise of scores and gradients is from.

By the decomposition and the batch gradients that likelihood runs are measured by, of the run's own
loss. Answers of rewarded runs are written anew by the parameters that are measured.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax import alignment, files, meter, plots, rng, variance
from mdm_jax.alignment import rewards as reward_functions
from mdm_jax.alignment import training as objectives
from mdm_jax.alignment.methods import METHODS, per_token
from mdm_jax.estimates import Estimate, finite_or_none, square_norm, start
from mdm_jax.launch.alignment import estimator_table
from mdm_jax.launch.alignment.experiment import AlignedExperiment, Round, aligned
from mdm_jax.launch.alignment.validation import read_reference
from mdm_jax.launch.auto.chain import CANDIDATES
from mdm_jax.launch.build import Experiment
from mdm_jax.launch.config import MeasureSettings
from mdm_jax.launch.modes import measure as of_bounds
from mdm_jax.launch.modes.variance_report import BASELINE, Result, recommend, write_csv
from mdm_jax.launch.names import CONFIGURED
from mdm_jax.launch.workdir import write_json, writing
from mdm_jax.meter.decompose import Decomposition
from mdm_jax.meter.subject import Estimator, Subject
from mdm_jax.objectives.objective import Objective
from mdm_jax.progress import progress_bar
from mdm_jax.pytrees import trained
from mdm_jax.types import PyTree, worst_bias
from mdm_jax.variance.transform import VarianceTransform, draw_batch


@dataclasses.dataclass(frozen=True)
class AlignedResult(Result):
    """A chain's :class:`Result`; ``score``: A, B, C of the margin of a pair, or of the score of an
    answer, nats squared."""

    score: Decomposition | None = None

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"score": self.score and self.score.to_dict()}


def configured(experiment: Experiment) -> Callable[..., list[str]]:
    """:func:`measure` with the chains (``measure.methods``) and settings of the config."""
    c = experiment.config
    names = [name for name in c.measure.methods if name not in (BASELINE, CONFIGURED)]
    chosen = names or [", ".join(order) for order in CANDIDATES.get(c.process, ())]
    settings = of_bounds.settings_of(c)

    def run(experiment: Experiment, workdir: files.Path, show: Callable[[str], None]) -> list[str]:
        shown = lambda record: show(estimator_table.format_tables(record))  # noqa: E731
        return measure(experiment, workdir, chosen, settings, shown)["files"]

    return run


def measure(
    experiment: Experiment,
    workdir: files.Path,
    chosen: list[str],
    settings: MeasureSettings,
    show: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure independent draws, the run's chain and those ``chosen``; write ``variance/``.

    Of rewarded runs all methods too, on the same answers; of pairs, what sharing the masks between
    policy and reference removes. Raises as ``of_bounds.measure``; ValueError for ``kto``, whose
    loss is no sum over rows.
    """
    if experiment.config.alignment.method == "kto":
        raise ValueError(
            "alignment.method='kto' compares answers with the mean of their batch, so its noise "
            "has no sources by row; measure a run of dpo, ipo or simpo"
        )
    bench = _Bench(*_at_parameters(aligned(experiment), workdir), settings)
    e, results = bench.experiment, {}
    names = [BASELINE, CONFIGURED, *chosen]
    with progress_bar(len(names), unit="chains") as bar:
        for name in names:
            bar.set_description(name)
            results[name] = bench.of_chain(name)
            bar.update(1)
    record = {
        "step": bench.step,
        "parameters": of_bounds.origin(e, bench.step),
        "method": e.settings.method,
        "batch_size": bench.spec.batch_size,
        "answers": bench.group,
        "settings": dataclasses.asdict(settings),
        "methods": {name: result.to_dict() for name, result in results.items()},
        "recommendation": recommend(results),
        "sharing": bench.sharing(),
        "estimators": bench.estimators(),
    }
    show(record)
    directory = workdir / "variance"
    measured = {name: result for name, result in results.items() if not result.refused}
    bars = (8, 1.6 + 0.25 * len(measured))
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        write_csv(directory / "variance.csv", record)
        paths = [directory / "variance.json", directory / "variance.csv"]
        for of in ("gradient", "loss", "score"):
            parts = {name: getattr(result, of) for name, result in measured.items()}
            paths.append(directory / f"components_{of}.png")
            draw = functools.partial(plots.component_bars, results=parts, what=of)
            plots.save(draw, paths[-1], bars)
        paths.append(directory / "efficiency.png")
        figures = {name: result.efficiency for name, result in measured.items()}
        plots.save(functools.partial(plots.efficiency_bars, results=figures), paths[-1], bars)
        record["files"] = [str(path) for path in paths]
        write_json(directory / "variance.json", record)
    return record


def _at_parameters(
    experiment: AlignedExperiment, workdir: files.Path
) -> tuple[AlignedExperiment, int | None, PyTree, PyTree | None]:
    """As ``of_bounds.parameters``, with the reference."""
    experiment, step, params, state = of_bounds.parameters(experiment, workdir)
    if experiment.has_reference:
        reference = read_reference(experiment, workdir)
        start = params if reference is None else reference  # not begun: they are the same
        experiment = dataclasses.replace(experiment, frozen=start)
    return experiment, step, params, state


class _Bench:
    """Parameters, rows and noise shared by all chains and methods."""

    def __init__(
        self,
        experiment: AlignedExperiment,
        step: int | None,
        params: PyTree,
        own_state: PyTree | None,
        settings: MeasureSettings,
    ):
        self.experiment, self.step, self.params = experiment, step, params
        self.own_state, self.settings = own_state, settings
        self.group = experiment.settings.answers if experiment.reward else 1
        self.spec, size = experiment.spec, experiment.spec.batch_size
        count = max(settings.groups * size, self._rows())
        if experiment.reward:
            self.round = experiment.written(params, count, step or 0)
            self.pool = self.round.answers
        else:
            self.pool = experiment.measured_rows(params, count, step or 0)
        self.rows = self._slice(0, self._rows())
        self.batches = [self._slice(i * size, size) for i in range(settings.data_batches)]
        c = experiment.config
        self.apply_fn = experiment.apply_at(c.seed, step or 0, experiment.frozen)
        self.estimator = meter.make_estimator(self.apply_fn, experiment.objective)
        self.scores = meter.make_estimator(self.apply_fn, self._scores())

    def _rows(self) -> int:
        """Rows of the decomposition: whole groups, two or more."""
        return max(2, math.ceil(self.settings.rows / self.group)) * self.group

    def _slice(self, first: int, count: int) -> Any:
        return jax.tree.map(lambda field: jnp.asarray(field[first : first + count]), self.pool)

    def _scores(self) -> Objective:
        e = self.experiment
        s, inner = e.settings, e.base.objective
        if e.reward:
            return objectives.answer_scores(inner, s.method, mask_id=e.dataset.mask_id)
        return objectives.pair_objective(inner, objectives.margin_of(s.method), s.replicates)

    def key(self, name: str) -> Any:
        return rng.stream(self.experiment.key(0, "variance"), name)

    def of_chain(self, name: str) -> AlignedResult:
        """Measurements under a chain, or why there are none."""
        e, own = self.experiment, name == CONFIGURED
        result = AlignedResult(chain=name, corruption=e.objective.corruption.name, bias="")
        try:
            if not own:
                chain = () if name == BASELINE else of_bounds.chain_named(name).order
                e = e.with_chain(of_bounds.chains.Chain(chain))
            transform, s = e.transform, self.settings
            state = transform.init(self.spec)
            if own and self.own_state is not None:
                state = self.own_state
            elif jax.tree.leaves(state):
                state = meter.warm_up(
                    self.apply_fn,
                    self.estimator.objective,
                    transform,
                    self.spec,
                    self.params,
                    state,
                    itertools.islice(itertools.cycle(self.batches), s.warm_up),
                    self.key("warm-up"),
                )
            subject = Subject(self.estimator, self.params, transform, state, self.spec)
            loss, gradient = meter.decompose_by_probes(
                subject, self.rows, self.key("decompose"), probes=s.probes, **self._design()
            )
            score = self._decomposed(subject, self.scores)
            options = {"groups": s.groups, "redraws": s.redraws}
            options["num_microbatches"] = e.num_microbatches
            efficiency = meter.efficiency(subject, self.batches, self.key("efficiency"), **options)
            training = None
            if self.spec.batch_size % transform.views == 0:
                training = meter.efficiency_at_equal_passes(
                    subject,
                    self.pool,
                    self.key("training"),
                    passes=self.spec.batch_size,
                    **options,
                )
        except ValueError as error:
            return dataclasses.replace(result, refused=str(error))
        return dataclasses.replace(
            result,
            chain=transform.name,
            bias=worst_bias(e.objective.bias, transform.bias),
            chain_bias=transform.bias,
            loss=loss,
            gradient=gradient,
            efficiency=efficiency,
            training=training,
            score=score,
        )

    def _design(self) -> dict[str, int]:
        s = self.settings
        design = {"levels_per_row": s.levels_per_row, "masks_per_level": s.masks_per_level}
        return design | {"chunk": s.chunk, "group": self.group}

    def _decomposed(self, subject: Subject, estimator: Estimator) -> Decomposition:
        subject = dataclasses.replace(subject, estimator=estimator)
        return meter.decompose(subject, self.rows, self.key("decompose"), **self._design())

    def sharing(self) -> dict[str, Any] | None:
        """Variance of the margin by masks and levels where policy and reference share them, and
        where they do not: then that of both bounds. None without a reference or pairs."""
        e = self.experiment
        if e.reward or not e.has_reference:
            return None
        state = e.transform.init(self.spec) if self.own_state is None else self.own_state
        subject = Subject(self.scores, self.params, e.transform, state, self.spec)
        shared, parts = self._decomposed(subject, self.scores).noise, []
        for network in range(2):
            objective = objectives.pair_objective(
                e.base.objective, objectives.bound_margin_of(network), e.settings.replicates
            )
            estimator = meter.make_estimator(self.apply_fn, objective)
            parts.append(self._decomposed(subject, estimator).noise)
        # Both are measured on the same pairs and draws, so their errors at most add up.
        independent = Estimate(*(first + second for first, second in zip(*parts)))
        factor = independent.value / shared.value if shared.value > 0 else math.inf
        return {
            "shared": shared.value,
            "shared_standard_error": finite_or_none(shared.standard_error),
            "independent": independent.value,
            "independent_standard_error": finite_or_none(independent.standard_error),
            "factor": finite_or_none(factor),
        }

    def estimators(self) -> dict[str, Any] | None:
        """All methods on the answers of the run under stratified draws, given these answers: noise
        over signal, and the cosine of the mean gradient with the trace's. None for pairs."""
        if not self.experiment.reward:
            return None
        names = [name for name in METHODS if METHODS[name].policy_gradient != "none"]
        kinds = {name: self._estimator_of(name) for name in names}
        groups = []
        with progress_bar(len(self.batches), unit="batches") as bar:
            for number in range(len(self.batches)):
                groups.append(self._moments(kinds, number))
                bar.update(1)
        record = estimator_table.summarise(kinds, groups)
        for method, figures in record.items():
            label = self.experiment.policy_gradient_label(method)
            figures["policy_gradient"] = label.partition(":")[0]
        return record

    def _estimator_of(self, method: str) -> Any:
        e, s = self.experiment, self.experiment.settings
        if method == "trace" and s.tail == "masked":
            return estimator_table.Kind(None, None, "scores the whole canvas")
        clip = None
        if objectives.has_ratio(method):
            clip = per_token(s.clip_low), per_token(s.clip_high)
        try:
            objective = objectives.policy_objective(
                e.base.objective, method, clip=clip, mask_id=e.dataset.mask_id
            )
        except ValueError as error:  # of another process than masked
            return estimator_table.Kind(None, None, str(error))
        replicates = 2 if method in ("spg", "gdpo") else 1
        transform = alignment.replicated(variance.chain(variance.stratified()), replicates)
        estimator = meter.make_estimator(self.apply_fn, objective)
        return estimator_table.Kind(estimator, transform, "")

    def _moments(self, kinds: Mapping[str, Any], number: int) -> dict[str, Any]:
        """Moments of the gradient of one batch of answers over redraws, by method."""
        size, found, truth = self.spec.batch_size, {}, None
        for method, kind in kinds.items():
            if kind.refused:
                continue
            batch = self._with_factors(method, number * size, size)
            mean, terms, redraws = start(trained(self.params)).mean, [], self.settings.redraws
            for draw in range(redraws):
                key = jax.random.fold_in(self.key(f"estimator {method} {number}"), draw)
                drawn = self._draw(kind.transform, kind.estimator.objective, key)
                mean, term = kind.estimator.accumulate(
                    mean, np.float32(draw), self.params, batch, drawn,
                    self.experiment.num_microbatches,
                )  # fmt: skip
                terms.append(term)
            spread = float(np.mean(jax.device_get(terms[1:])))
            signal = float(square_norm(mean)) - spread / redraws
            if method == "trace":
                truth = mean, signal
            product = math.nan if truth is None else float(_inner(mean, truth[0]))
            if method == "trace":
                product = signal  # with itself the product has the noise twice
            found[method] = estimator_table.Moments(spread, signal, product)
        return found

    def _draw(self, transform: VarianceTransform, objective: Objective, key: Any) -> Any:
        spec = objective.spec(self.spec.batch_size, self.experiment.length)
        return draw_batch(key, transform, transform.init(spec), spec)

    def _with_factors(self, method: str, first: int, count: int) -> Any:
        """Answers with the coefficients that the method gives them, of the same rewards."""
        made: Round = self.round
        factors = reward_functions.coefficients(
            method, self.experiment.settings.advantages, made.rewards
        )
        batch = made.answers._replace(
            advantage=factors.values.reshape(-1).astype(np.float32),
            weight=factors.weight.reshape(-1).astype(np.float32),
        )
        return jax.tree.map(lambda field: jnp.asarray(field[first : first + count]), batch)


@jax.jit
def _inner(first: PyTree, second: PyTree) -> Any:
    return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)))
