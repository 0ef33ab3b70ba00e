"""The mode ``variance``: sources of gradient noise, and the method that reduces it most.

Measures, for a checkpoint or a fresh model: loss and gradient by noise level; A, B and C under
every method; the variance of the batch gradient per compute, by which one is recommended.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mdm_jax import data, files, meter, rng, sharding, variance
from mdm_jax.launch.auto import chain as chains
from mdm_jax.launch.build import Experiment, open_workdir
from mdm_jax.launch.config import MeasureSettings
from mdm_jax.launch.modes.train import initial_state
from mdm_jax.launch.modes.variance_report import (
    BASELINE,
    Result,
    format_table,
    recommend,
    write_report,
)
from mdm_jax.launch.names import CONFIGURED, METHODS, Method
from mdm_jax.launch.workdir import write_json, writing
from mdm_jax.meter.efficiency import Efficiency, inverse_rates_diverge
from mdm_jax.meter.levels import LevelTable
from mdm_jax.meter.subject import Estimator, Subject
from mdm_jax.objectives.objective import Objective
from mdm_jax.progress import progress_bar
from mdm_jax.types import Batch, PyTree, worst_bias
from mdm_jax.variance.transform import Phase, VarianceTransform

_MASKED_ONLY = ("bernoulli", "rao_blackwell")
"""Corruptions that are methods of the masked process alone."""

_INVERSE_RATES = ("bernoulli", "bernoulli_shifted_logit")
"""Corruptions with weights 1/m."""

_INFINITE = (
    "weights 1/m under a density that stays bounded down to m = 0 have infinite variance, whatever "
    "these redraws show; use fixed counts, Rao-Blackwell weights, a law with more small rates "
    "(power) or one that stays away from 0"
)
"""Holds though a few hundred redraws of long rows rarely show it."""


def named(methods: Iterable[str], experiment: Experiment) -> dict[str, Method]:
    """Methods by name, the baseline first; ValueError with close matches.

    A name that is none of :data:`METHODS` is a chain of registered transforms, such as
    "stratified, ema_bins", with the settings and the corruption of the run.
    """
    wanted = [BASELINE, *(name for name in methods if name not in (BASELINE, CONFIGURED))]
    return {name: METHODS.get(name) or _chain(name, experiment) for name in wanted}


def chain_named(name: str) -> chains.Chain:
    """The chain of registered transforms, such as "stratified, ema_bins"."""
    return chains.Chain(tuple(part.strip() for part in name.split(",")))


def _chain(name: str, experiment: Experiment) -> Method:
    chain = chain_named(name)
    law = experiment.objective.law
    made = chains.transform(experiment.config, law, chain)
    return Method(lambda _table: made, None)


def measure(
    experiment: Experiment,
    workdir: files.Path,
    methods: Mapping[str, Method] | None = None,
    settings: MeasureSettings | None = None,
    show: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure every method, write ``variance/`` below the workdir, return the record.

    All share parameters (of the last checkpoint, if any), rows and base noise. The baseline and the
    run's own chain are added to ``methods`` (None: :data:`METHODS`); one that fails is kept with
    the reason. ``show(record)`` is called before anything is written. Raises ValueError if the
    settings do not fit the data, or the run has no noise.
    """
    settings = MeasureSettings() if settings is None else settings
    experiment, step, params, own_state = parameters(experiment, workdir)
    methods = {BASELINE: METHODS[BASELINE], **(METHODS if methods is None else methods)}
    methods[CONFIGURED] = Method(lambda _table: experiment.transform, None)
    bench = _Bench(experiment, params, own_state, settings)
    with progress_bar(len(methods), unit="methods") as bar:
        results = {}
        for name, method in methods.items():
            bar.set_description(name)
            results[name] = bench.measure(name, method)
            bar.update(1)
    record = {
        "step": step,
        "parameters": origin(experiment, step),
        "batch_size": experiment.spec.batch_size,
        "levels_from": experiment.family.levels_from,
        "settings": dataclasses.asdict(settings),
        "methods": {name: result.to_dict() for name, result in results.items()},
        "levels": {name: table.to_dict() for name, table in bench.tables.items()},
        "recommendation": recommend(results),
    }
    own = experiment.objective.corruption.name
    show(record)
    with writing(workdir / "variance"):
        record["files"] = write_report(
            workdir / "variance", record, results, bench.levels(own), experiment.family.noise_axis
        )
        write_json(workdir / "variance" / "variance.json", record)
    return record


def settings_of(config: ConfigDict) -> MeasureSettings:
    """The settings of the section ``measure``."""
    names = [field.name for field in dataclasses.fields(MeasureSettings)]
    return MeasureSettings(**{name: config.measure[name] for name in names})


def configured(experiment: Experiment) -> Callable[..., list[str]]:
    """:func:`measure` with the methods and settings of the config; ValueError for its chains.

    ``(experiment, workdir, show) -> files``, where ``show`` gets a table.
    """
    chosen = experiment.config.measure.methods
    methods = named(chosen, experiment) if chosen else None
    settings = settings_of(experiment.config)

    def run(experiment: Experiment, workdir: files.Path, show: Callable[[str], None]) -> list[str]:
        shown = lambda record: show(format_table(record))  # noqa: E731
        return measure(experiment, workdir, methods, settings, shown)["files"]

    return run


class _Bench:
    """Parameters, rows, batches and noise shared by all methods."""

    def __init__(self, experiment: Experiment, params: PyTree, own_state, settings):
        self.experiment, self.params, self.settings = experiment, params, settings
        self.own_state, self.tables, self.estimators = own_state, {}, {}
        source, size = experiment.dataset.train, experiment.spec.batch_size
        generator = np.random.default_rng(experiment.config.seed)
        place = functools.partial(
            sharding.place_batch, sharding=sharding.batch_sharding(experiment.mesh)
        )

        def rows(count: int) -> Batch:
            return data.sample_rows(source, count, generator)

        self.rows, self.grid_rows = rows(settings.rows), rows(settings.grid_rows)
        self.batches = [place(rows(size)) for _ in range(settings.data_batches)]
        self.pool = jax.tree.map(jnp.asarray, rows(settings.groups * size))
        self.warm_up = [place(rows(size)) for _ in range(min(settings.warm_up, 8))]

    def measure(self, name: str, method: Method) -> Result:
        """Measurements of a method, or why there are none."""
        several = self.experiment.family.with_corruption is not None
        own = self.experiment.objective.corruption.name
        corruption = (method.corruption or own) if several else own
        result = Result(chain=name, corruption=corruption, bias="")
        try:
            if not several and method.corruption in _MASKED_ONLY:
                raise ValueError(f"{method.corruption} masks are no method for {corruption}")
            objective = self.estimator(corruption).objective
            transform = method.build(self.levels(corruption))
            result = dataclasses.replace(
                result,
                chain=transform.name,
                bias=worst_bias(objective.bias, transform.bias),
                chain_bias=transform.bias,
            )
            return self._measured(result, objective, transform, own=name == CONFIGURED)
        except ValueError as error:
            return dataclasses.replace(result, refused=str(error))

    def _measured(
        self, result: Result, objective: Objective, transform: VarianceTransform, own: bool
    ) -> Result:
        s, experiment = self.settings, self.experiment
        spec = self._spec(objective)
        state = transform.init(spec)
        if own and self.own_state is not None:
            state = self.own_state
        elif jax.tree.leaves(state):
            state = self._warmed_up(objective, transform, state)
        estimator = self.estimator(result.corruption)
        subject = Subject(estimator, self.params, transform, state, spec)
        key = experiment.key(0, "variance")
        num_microbatches = experiment.num_microbatches
        loss, gradient = meter.decompose_by_probes(
            subject,
            self.rows,
            rng.stream(key, "decompose"),
            probes=s.probes,
            levels_per_row=s.levels_per_row,
            masks_per_level=s.masks_per_level,
            chunk=s.chunk,
        )
        figure = meter.efficiency(
            subject,
            self.batches,
            rng.stream(key, "efficiency"),
            groups=s.groups,
            redraws=s.redraws,
            num_microbatches=num_microbatches,
        )
        training_figure = None
        if spec.batch_size % transform.views == 0:
            training_figure = meter.efficiency_at_equal_passes(
                subject,
                self.pool,
                rng.stream(key, "training"),
                passes=spec.batch_size,
                groups=s.groups,
                redraws=s.redraws,
                num_microbatches=num_microbatches,
            )
        if result.corruption in _INVERSE_RATES and inverse_rates_diverge(
            objective, transform, state, spec
        ):
            figure, training_figure = map(_infinite, (figure, training_figure))
        warps = any(t.phase == Phase.WARP for t in transform.members or (transform,))
        return dataclasses.replace(
            result,
            loss=loss,
            gradient=gradient,
            efficiency=figure,
            training=training_figure,
            density=meter.warp_density(key, transform, state, spec, objective) if warps else None,
        )

    def _spec(self, objective: Objective):
        return objective.spec(self.experiment.spec.batch_size, self.experiment.dataset.length)

    def _warmed_up(
        self, objective: Objective, transform: VarianceTransform, state: PyTree
    ) -> PyTree:
        batches = itertools.islice(itertools.cycle(self.warm_up), self.settings.warm_up)
        key = self.experiment.key(0, "warm-up")
        return meter.warm_up(
            self.experiment.apply_fn,
            objective,
            transform,
            self._spec(objective),
            self.params,
            state,
            batches,
            key,
        )

    def estimator(self, corruption: str) -> Estimator:
        """The run's objective under a corruption, compiled once for all methods."""
        if corruption not in self.estimators:
            family = self.experiment.family
            objective = family.objective
            if corruption != objective.corruption.name:
                objective = family.with_corruption(corruption)
            self.estimators[corruption] = meter.make_estimator(family.apply_fn, objective)
        return self.estimators[corruption]

    def levels(self, corruption: str) -> LevelTable:
        """Loss and gradient by level under a corruption, measured once."""
        if corruption not in self.tables:
            experiment, s = self.experiment, self.settings
            estimator = self.estimator(corruption)
            spec, identity = self._spec(estimator.objective), variance.identity()
            highest, lowest = (
                float(jax.nn.sigmoid(-jnp.asarray(end))) for end in estimator.objective.law.support
            )
            self.tables[corruption] = meter.measure_levels(
                Subject(estimator, self.params, identity, identity.init(spec), spec),
                self.grid_rows,
                experiment.key(0, "levels"),
                masking_rates=meter.rate_grid(s.grid_levels, max(lowest, 1e-2), min(highest, 1.0)),
                masks_per_level=s.grid_masks,
                probes=s.probes,
                chunk=s.chunk,
            )
        return self.tables[corruption]


def _infinite(figure: Efficiency | None) -> Efficiency | None:
    settled = figure is not None and figure.settled
    return dataclasses.replace(figure, unsettled=_INFINITE) if settled else figure


def origin(experiment: Experiment, step: int | None) -> str:
    """Whose parameters are measured, for display; ``step`` as of :func:`parameters`."""
    c = experiment.config
    if step is not None:
        return f"a checkpoint of step {step}"
    if c.train.init_from:
        return f"the run {c.train.init_from}"
    return "a fresh model" if experiment.source is None else c.model.source


def parameters(
    experiment: Experiment, workdir: files.Path
) -> tuple[Experiment, int | None, PyTree, PyTree | None]:
    """(the run under its chain, step or None before training, parameters, the chain's state).

    Before training they are those that it starts from. ValueError for a run without noise or with
    another loss than the bound; WorkdirError and CheckpointError as of ``train.initial_state``.
    """
    if experiment.config.process == "autoregressive":
        raise ValueError("an autoregressive run has no noise whose variance could be measured")
    method = experiment.config.alignment.method
    if method and experiment.objective.summed is None:
        raise ValueError(
            f"curves are fitted to the likelihood bound, and this run's loss is "
            f"alignment.method={method!r}; fit them to the run that it started from"
        )
    restored = None
    if (workdir / "checkpoints").exists():
        checkpoints = open_workdir(workdir)
        try:
            restored = checkpoints.restore_last_fields(
                lambda records: experiment.with_noted_chain(records["notes"]).abstract_state(),
                ("step", "params", "variance"),
            )
        finally:
            checkpoints.close()
    if restored is None:
        params = initial_state(experiment).params
        return experiment, None, experiment.with_frozen(workdir).variables(params), None
    state = restored.state
    own = experiment.with_noted_chain(restored.notes)
    params = experiment.with_frozen(workdir).variables(state.params)
    return own, int(state.step), params, state.variance
