"""The mode ``variance``: where the noise of training comes from, and which method removes most.

Measures, for the parameters of a checkpoint or of a fresh model: loss and gradient by noise level;
A, B and C under every method; and the variance of the batch gradient per compute, by which the
methods are compared and one is recommended. Nothing is trained and no state is written.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from mdm_jax import data, rng, sharding, variance
from mdm_jax import meter as mdm_jax_meter
from mdm_jax.launch import build as launch_build
from mdm_jax.launch import build_masked
from mdm_jax.launch.experiment import Experiment, open_workdir
from mdm_jax.launch.variance_report import BASELINE, format_table, recommend, write_report
from mdm_jax.launch.workdir import write_json
from mdm_jax.meter.decompose import Decomposition
from mdm_jax.meter.efficiency import Efficiency, inverse_rates_diverge
from mdm_jax.meter.levels import LevelTable
from mdm_jax.meter.subject import Estimator, Subject
from mdm_jax.objectives.objective import Objective, stop_gradient_stats
from mdm_jax.types import Array, Batch, PyTree, worst_bias
from mdm_jax.variance.densities import log_spaced_edges
from mdm_jax.variance.epr import fit_epr
from mdm_jax.variance.moments import level_variance, second_moment
from mdm_jax.variance.transform import Phase, VarianceTransform

__all__ = ["METHODS", "Method", "Settings", "format_table", "measure", "named"]

CONFIGURED = "this run"
"""The chain, process and state that the run itself trains with."""


_MASKED_ONLY = ("bernoulli", "rao_blackwell")
"""Processes that are methods by themselves, and mean nothing for Gaussian diffusion."""

_INVERSE_RATES = ("bernoulli", "bernoulli_shifted_logit")
"""Processes with weights 1/m."""

_INFINITE = (
    "weights 1/m under a density that stays bounded down to m = 0 have infinite variance, whatever "
    "these redraws show; use fixed counts, Rao-Blackwell weights, a law with more small rates "
    "(power) or one that stays away from 0"
)
"""Known, and rarely seen in a few hundred redraws of long rows."""


class Method(NamedTuple):
    """A method to be measured.

    Attributes:
        build: from the levels measured under its process to a transform; most ignore them.
        corruption: name of the process in ``build_masked.CORRUPTIONS``, or None for the run's own.
    """

    build: Callable[[LevelTable], VarianceTransform]
    corruption: str | None = "fixed_count"


def _fixed(*factories: Callable[[], VarianceTransform]) -> Callable:
    return lambda _table: variance.chain(*(factory() for factory in factories))


def _binned(table: LevelTable, target: Callable) -> VarianceTransform:
    edges = log_spaced_edges(16)
    moments = mdm_jax_meter.binned_moments(table, table.gradient, edges)
    return variance.ppots_binned(edges, target(moments))


def _parametric(table: LevelTable) -> VarianceTransform:
    value = table.loss.value
    spread = np.maximum(value.pattern, 0.0)  # the published target, v + g^2 of the loss
    # Over 1 - u, which is the masking rate where that is uniform.
    fit = fit_epr(1.0 - table.quantiles, value.mean, spread)
    return variance.chain(variance.ppots_parametric(fit.parameters))


def _stratified_binned(table: LevelTable) -> VarianceTransform:
    return variance.chain(variance.stratified(), _binned(table, level_variance))


_online = functools.partial(variance.ppots, num_bins=16, warmup_steps=10, decay=0.99)
_slopes = functools.partial(variance.ppots_slopes, num_bins=16, warmup_steps=10)
_ema = functools.partial(variance.ema_bins, num_bins=16, warmup_steps=10)
_history = functools.partial(variance.loss_history, num_bins=16)
_clipped = functools.partial(variance.clipped, 0.3, 0.8)
_mixture = functools.partial(variance.clipped_mixture, 0.3, 0.8, 0.3)

METHODS: dict[str, Method] = {
    BASELINE: Method(_fixed(variance.identity)),
    "stratified": Method(_fixed(variance.stratified)),
    "systematic": Method(_fixed(variance.systematic)),
    "antithetic pairs": Method(_fixed(variance.antithetic_pairs)),
    "coarse strata": Method(_fixed(variance.coarse_strata)),
    "stratified levels": Method(_fixed(variance.stratified_levels)),
    "repeat": Method(_fixed(variance.repeat)),
    "mirror": Method(_fixed(variance.mirror)),
    "complement": Method(_fixed(variance.complement)),
    "rotate, 4 views": Method(_fixed(functools.partial(variance.rotate, 4))),
    "rotate ranks, 4 views": Method(_fixed(functools.partial(variance.rotate_ranks, 4))),
    "stratified, mirror": Method(_fixed(variance.stratified, variance.mirror)),
    "stratified, rotate ranks": Method(_fixed(variance.stratified, variance.rotate_ranks)),
    "ppots": Method(_fixed(_online)),
    "ppots, parametric": Method(_parametric),
    "ppots, slopes": Method(_fixed(_slopes)),
    "stratified, ppots slopes": Method(_fixed(variance.stratified, _slopes)),
    "ppots, binned": Method(lambda table: _binned(table, second_moment)),
    "stratified, ppots binned": Method(_stratified_binned),
    "stratified, ppots binned, mirror": Method(
        lambda table: variance.chain(_stratified_binned(table), variance.mirror())
    ),
    "ema bins": Method(_fixed(_ema)),
    "loss history": Method(_fixed(_history)),
    "learned quantile": Method(_fixed(variance.learned_quantile)),
    "clipped": Method(_fixed(_clipped)),
    "clipped mixture": Method(_fixed(_mixture)),
    "rao-blackwell": Method(_fixed(variance.identity), "rao_blackwell"),
    "rao-blackwell, complement": Method(_fixed(variance.complement), "rao_blackwell"),
    "bernoulli": Method(_fixed(variance.identity), "bernoulli"),
    "bernoulli, log-uniform": Method(_fixed(variance.log_uniform), "bernoulli"),
    "bernoulli, ppots": Method(_fixed(_online), "bernoulli"),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much to measure.

    Attributes:
        rows, levels_per_row, masks_per_level, probes: design of the decomposition.
        grid_rows, grid_levels, grid_masks: design of the statistics by level.
        groups, redraws, data_batches: design of the batch gradient's variance; with as many
            batches as groups the standard errors cover the choice of the batches.
        warm_up: batches that an adaptive transform learns from before it is measured.
        chunk: rows of a forward call in the decomposition.
    """

    rows: int = 32
    levels_per_row: int = 4
    masks_per_level: int = 2
    probes: int = 2
    grid_rows: int = 16
    grid_levels: int = 12
    grid_masks: int = 4
    groups: int = 8
    redraws: int = 12
    data_batches: int = 8
    warm_up: int = 50
    chunk: int = 32


def named(names: Iterable[str]) -> dict[str, Method]:
    """The methods of those names, the baseline first.

    Raises:
        ValueError: naming the nearest valid names.
    """
    wanted = [BASELINE, *(name for name in names if name not in (BASELINE, CONFIGURED))]
    return {name: launch_build.lookup(METHODS, name, "variance methods") for name in wanted}


def measure(
    experiment: Experiment,
    workdir: pathlib.Path,
    methods: Mapping[str, Method] | None = None,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Measures every method, writes ``variance/`` below the working directory, returns the record.

    All methods see the same parameters, rows and base noise. The run's own chain is always among
    them. A method that cannot be built or measured is kept in the record with the reason.

    Args:
        experiment: what is trained.
        workdir: its directory; the last checkpoint is used if there is one.
        methods: by name, :data:`METHODS` if not given; the baseline is added if missing.
        settings: how much to measure.

    Raises:
        ValueError: if the settings do not fit the data, or the run has no noise.
    """
    if experiment.config.process == "autoregressive":
        raise ValueError("an autoregressive run has no noise whose variance could be measured")
    settings = Settings() if settings is None else settings
    chosen = {BASELINE: METHODS[BASELINE], **(METHODS if methods is None else methods)}
    chosen[CONFIGURED] = Method(lambda _table: experiment.transform, None)
    step, params, own_state = _parameters(experiment, workdir)
    meter = _Meter(experiment, params, own_state, settings)
    with tqdm.tqdm(total=len(chosen), unit="method") as bar:
        results = {}
        for name, method in chosen.items():
            bar.set_description(name)
            results[name] = meter.method(name, method)
            bar.update(1)
    record = {
        "step": step,
        "parameters": "a fresh model" if step is None else f"a checkpoint of step {step}",
        "batch_size": experiment.spec.batch_size,
        "levels_from": experiment.source_of_levels(),
        "settings": dataclasses.asdict(settings),
        "methods": {name: result.to_dict() for name, result in results.items()},
        "levels": {name: table.to_dict() for name, table in meter.tables.items()},
        "recommendation": recommend(results),
    }
    own = experiment.objective.corruption.name
    record["files"] = write_report(
        workdir / "variance", record, results, meter.levels(own), experiment.process.LEVEL
    )
    write_json(workdir / "variance" / "variance.json", record)
    return record


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured of one method.

    Attributes:
        chain: name of the transform.
        corruption: name of the process.
        bias: the worse label of objective and chain.
        chain_bias: of the chain alone, what it adds to the objective's.
        loss, gradient: A, B, C of one forward pass.
        efficiency: of the batch gradient, data fixed.
        training: of the batch gradient with rows drawn anew too, which is what the optimiser sees,
            in batches of as many forward passes as the run has rows; None where the views do not
            divide these.
        density: (masking rates, density) that it draws from, None for the objective's own law.
        refused: why it could not be measured, or an empty string; everything else is None then.
    """

    chain: str
    corruption: str
    bias: str
    chain_bias: str = "exact"
    loss: Decomposition | None = None
    gradient: Decomposition | None = None
    efficiency: Efficiency | None = None
    training: Efficiency | None = None
    density: tuple[np.ndarray, np.ndarray] | None = None
    refused: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the density stays with the plots."""
        found: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("chain", "corruption", "bias", "chain_bias", "refused")
        }
        for name in ("loss", "gradient", "efficiency", "training"):
            part = getattr(self, name)
            found[name] = None if part is None else part.to_dict()
        return found


class _Meter:
    """Everything that the methods share: parameters, rows, batches and noise."""

    def __init__(self, experiment: Experiment, params: PyTree, own_state, settings: Settings):
        self.experiment, self.params, self.settings = experiment, params, settings
        self.own_state, self.tables, self.estimators = own_state, {}, {}
        source, size = experiment.dataset.train, experiment.spec.batch_size
        generator = np.random.default_rng(experiment.config.seed)
        place = functools.partial(
            sharding.place_batch, sharding=sharding.batch_sharding(experiment.mesh)
        )

        def rows(count: int) -> Batch:
            return data.gather(source, generator.integers(0, len(source), count))

        self.rows, self.grid_rows = rows(settings.rows), rows(settings.grid_rows)
        self.batches = [place(rows(size)) for _ in range(settings.data_batches)]
        self.pool = jax.tree.map(jnp.asarray, rows(settings.groups * size))
        self.warm_up = [place(rows(size)) for _ in range(min(settings.warm_up, 8))]

    def method(self, name: str, method: Method) -> Result:
        corruption = self._process(method)
        result = Result(chain=name, corruption=corruption, bias="")
        try:
            if corruption not in build_masked.CORRUPTIONS and method.corruption in _MASKED_ONLY:
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

    def _process(self, method: Method) -> str:
        own = self.experiment.objective.corruption.name
        masked = self.experiment.config.process in ("masked", "block")
        return (method.corruption or own) if masked else own

    def _measured(
        self, result: Result, objective: Objective, transform: VarianceTransform, own: bool
    ) -> Result:
        settings, experiment = self.settings, self.experiment
        spec = objective.spec(experiment.spec.batch_size, experiment.dataset.length)
        state = transform.init(spec)
        if own and self.own_state is not None:
            state = self.own_state
        elif jax.tree.leaves(state):
            state = self._warmed_up(objective, transform, state, spec)
        estimator = self.estimator(result.corruption)
        subject = Subject(estimator, self.params, transform, state, spec)
        key = experiment.key(0, "variance")
        loss, gradient = mdm_jax_meter.decompose_by_probes(
            subject,
            self.rows,
            rng.stream(key, "decompose"),
            probes=settings.probes,
            levels_per_row=settings.levels_per_row,
            masks_per_level=settings.masks_per_level,
            chunk=settings.chunk,
        )
        figure = mdm_jax_meter.efficiency(
            subject,
            self.batches,
            rng.stream(key, "efficiency"),
            groups=settings.groups,
            redraws=settings.redraws,
            num_microbatches=experiment.config.train.num_microbatches,
        )
        training_figure = self._while_training(subject)
        if result.corruption in _INVERSE_RATES and inverse_rates_diverge(
            objective, transform, state, spec
        ):
            figure, training_figure = map(_infinite, (figure, training_figure))
        warps = any(t.phase == Phase.WARP for t in transform.members or (transform,))
        density = (
            mdm_jax_meter.warp_density(key, transform, state, spec, objective) if warps else None
        )
        return dataclasses.replace(
            result,
            loss=loss,
            gradient=gradient,
            efficiency=figure,
            training=training_figure,
            density=density,
        )

    def _while_training(self, subject: Subject) -> Efficiency | None:
        """Rows drawn anew; a K-th of them under K views."""
        rows, settings = self.experiment.spec.batch_size, self.settings
        if rows % subject.transform.views:
            return None
        rows //= subject.transform.views
        spec = subject.estimator.objective.spec(rows, self.experiment.dataset.length)
        return mdm_jax_meter.efficiency_with_data(
            dataclasses.replace(subject, spec=spec),
            self.pool,
            rng.stream(self.experiment.key(0, "variance"), "training"),
            groups=settings.groups,
            redraws=settings.redraws,
            num_microbatches=math.gcd(rows, self.experiment.config.train.num_microbatches),
        )

    def _warmed_up(self, objective, transform, state: PyTree, spec) -> PyTree:
        apply_fn = self.experiment.apply_fn

        @jax.jit
        def learn(params: PyTree, state: PyTree, batch: Batch, key: Array) -> PyTree:
            draw = variance.draw_batch(key, transform, state, spec)
            stats = objective.loss(lambda *inputs: apply_fn(params, *inputs), batch, draw)
            return transform.update(state, draw, stop_gradient_stats(stats))

        key = self.experiment.key(0, "warm-up")
        for number in range(self.settings.warm_up):
            batch = self.warm_up[number % len(self.warm_up)]
            state = learn(self.params, state, batch, jax.random.fold_in(key, number))
        return state

    def estimator(self, corruption: str) -> Estimator:
        """The run's objective over another process, compiled once for all methods."""
        if corruption not in self.estimators:
            config = self.experiment.config
            objective = self.experiment.objective
            if corruption != objective.corruption.name:
                changed = config.copy_and_resolve_references()
                changed.corruption.name = corruption
                objective = self.experiment.process.objective(changed, self.experiment.dataset)
            self.estimators[corruption] = mdm_jax_meter.make_estimator(
                self.experiment.apply_fn, objective
            )
        return self.estimators[corruption]

    def levels(self, corruption: str) -> LevelTable:
        """Loss and gradient by level under a process, measured once."""
        if corruption not in self.tables:
            experiment, settings = self.experiment, self.settings
            objective = self.estimator(corruption).objective
            ends = (jax.nn.sigmoid(-jnp.asarray(end)) for end in objective.law.support)
            highest, lowest = (float(end) for end in ends)
            identity = variance.identity()
            spec = objective.spec(experiment.spec.batch_size, experiment.dataset.length)
            self.tables[corruption] = mdm_jax_meter.measure_levels(
                Subject(
                    self.estimator(corruption), self.params, identity, identity.init(spec), spec
                ),
                self.grid_rows,
                experiment.key(0, "levels"),
                masking_rates=mdm_jax_meter.rate_grid(
                    settings.grid_levels, max(lowest, 1e-2), min(highest, 1.0)
                ),
                masks_per_level=settings.grid_masks,
                probes=settings.probes,
                chunk=settings.chunk,
            )
        return self.tables[corruption]


def _infinite(figure: Efficiency | None) -> Efficiency | None:
    settled = figure is not None and figure.settled
    return dataclasses.replace(figure, unsettled=_INFINITE) if settled else figure


def _parameters(
    experiment: Experiment, workdir: pathlib.Path
) -> tuple[int | None, PyTree, PyTree | None]:
    """(step or None for a fresh model, parameters, state of the run's own chain if it has one)."""
    restored = None
    if (workdir / "checkpoints").exists():
        checkpoints = open_workdir(workdir)
        try:
            restored = checkpoints.restore_last(experiment.abstract_state())
        finally:
            checkpoints.close()
    if restored is None:
        return None, experiment.initial_state().params, None
    return int(restored.state.step), restored.state.params, restored.state.variance
