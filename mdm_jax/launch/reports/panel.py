"""The noise panel of a training run: where the gradient's noise comes from, next to the loss."""

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mdm_jax import data, distributed, rng, sharding, training
from mdm_jax.estimates import mean_estimate
from mdm_jax.launch.build import Experiment
from mdm_jax.meter import panel
from mdm_jax.models import lora
from mdm_jax.training.step import TrainState
from mdm_jax.types import Array, Batch, PyTree

_TIMED, _TIMED_MEASUREMENTS = 5, 2
"""Steps that are timed before a measurement, and the measurements that are timed with them."""


class NoisePanel:
    """A :class:`~mdm_jax.training.loop.Panel` that measures A, B and C every so many steps.

    As seldom as ``panel.cost`` asks, first by the number of rows taken through the network, then by
    the times of the first two measurements and of a few steps before each, whichever is more; only
    there the host waits for the device. Compiles after the first step, in a thread beside the next
    ones, which wait for it shortly before the first measurement. Measurements are records of the
    kind "noise", figures at logging steps of the kind "panel".
    """

    def __init__(self, experiment: Experiment, writer: training.MetricWriter, start: int):
        self._experiment, self._writer = experiment, writer
        self._settings, self._group = design(experiment)
        self._compiling: futures.Future | None = None
        self._measure, self._pending = None, []
        self._records: list[Mapping[str, Any]] = []
        self._batch: Batch | None = None
        self._layout = jax.jit(_layout, out_shardings=_whole(experiment.mesh))
        self._times: list[float] = []
        self._untimed = _TIMED_MEASUREMENTS
        self.every = fewest_steps(experiment)
        self._due = (start // self.every + 1) * self.every if self.every else math.inf
        if distributed.is_first() and start and writer.path.exists():
            self._records = training.read_metrics(writer.path, "noise")
        if self._due > experiment.config.train.steps:
            self._due = math.inf
        else:
            print(
                f"noise panel: measures every {self.every} steps or less often, at most "
                f"{self._settings.cost:.1%} of the time (panel.cost)",
                flush=True,
            )

    def follow(self, experiment: Experiment) -> None:
        """Go on under another chain of the run."""
        self._experiment = experiment
        self._settings, self._group = design(experiment)
        if self._compiling is not None:
            self._compile()

    def wait(self) -> None:
        """Wait until the measurement is compiled, if any is made."""
        if self._due < math.inf:
            if self._compiling is None:
                self._compile()
            self._measure = self._compiling.result()

    def _compile(self) -> None:
        e = self._experiment
        by_rows = sharding.batch_sharding(e.mesh)

        def place(group: PyTree) -> PyTree:
            return jax.lax.with_sharding_constraint(group, by_rows) if self._group > 1 else group

        def at_step(
            params: PyTree, state: PyTree, batch: Batch, seed: Array, step: Array, frozen: PyTree
        ) -> tuple[Array, Array]:
            if e.adapter:
                params = lora.join(frozen, params, e.adapter)
            measure = panel.make_measurement(
                sharding.sharded_apply(
                    e.apply_at(seed, step, frozen), e.mesh, sharding.LOGICAL_RULES
                ),
                e.objective,
                e.transform,
                e.spec,
                self._settings,
                group=self._group,
                place=place,
            )
            return measure(params, state, batch, rng.stream(rng.step_key(seed, step), "panel"))

        abstract, self._seed = e.abstract_state(), e.placed_seed()
        jitted = jax.jit(at_step, out_shardings=_whole(e.mesh))
        rows = e.abstract_batch()
        rows = Batch(*rows[:4]) if e.buckets else rows
        arguments = (abstract.params, abstract.variance, rows, self._seed, abstract.step, e.frozen)
        pool = futures.ThreadPoolExecutor(1)
        self._compiling = pool.submit(
            lambda: jitted.lower(*arguments).compile(training.compiler_options())
        )
        pool.shutdown(wait=False)

    def visit(self, step: int, state: TrainState, batch: Batch) -> None:
        """Measure at steps that are due."""
        self._batch = batch
        if self._compiling is None and self._due < math.inf:
            self._compile()
        if step < self._due - _TIMED - 1:
            return
        self.wait()
        if self._untimed:
            jax.block_until_ready(state)
            self._times.append(time.monotonic())
        if step < self._due:
            return
        # A batch of one length has less of C than the mixture.
        rows = _sampled(self._experiment, step) if self._experiment.buckets else batch
        arguments = (state.params, state.variance, rows, self._seed, state.step)
        found = self._measure(*arguments, self._experiment.frozen)
        self._pending.append((step, found))
        if self._untimed:
            self.every, self._times = self._affordable(found), []
            self._untimed -= 1
        self._due = step + self.every

    def _affordable(self, found: PyTree) -> int:
        """Steps between measurements, from the times of this one and of the steps before."""
        jax.block_until_ready(found)
        seconds = time.monotonic() - self._times[-1]
        steps = [after - before for before, after in zip(self._times, self._times[1:])]
        every = fewest_steps(self._experiment)
        if steps:
            every = max(
                every, math.ceil(seconds / (self._settings.cost * statistics.median(steps)))
            )
        return distributed.from_first(every)

    def read(self, step: int, readings: Mapping[str, float]) -> dict[str, str]:
        """Write what was measured and the figures; returns those for the terminal."""
        for at, (sketches, eligible) in self._pending:
            record = panel.measured(np.asarray(sketches), int(eligible), self._group)
            if record is not None:
                self._writer.record(at, "noise", record)
                self._records.append({"step": at, **record})
        self._pending = []
        recent = self._records[-self._settings.window :]
        figures = critical_batch(readings, recent, self._experiment.spec.batch_size)
        for name, share in panel.shares(recent).items() if recent else ():
            figures[f"share_{name}"] = share.value
            figures[f"share_{name}_standard_error"] = share.standard_error
        if self._batch is not None:
            places = {n: float(v) for n, v in jax.device_get(self._layout(self._batch)).items()}
            if "masked_share" in readings:
                places["masked"] = readings["masked_share"] * places.pop("eligible")
            figures |= {f"tokens_{name}": value for name, value in places.items()}
        for name in ("effective_sample_size", "largest_weight"):
            if name in readings:
                figures[name] = readings[name]
        figures = {name: value for name, value in figures.items() if math.isfinite(value)}
        if figures:
            self._writer.record(step, "panel", figures)
        return shown(figures)


def _sampled(experiment: Experiment, step: int) -> Batch:
    """As many training rows as a batch has, whole and placed, drawn by seed and step."""
    size, by_rows = experiment.spec.batch_size, sharding.batch_sharding(experiment.mesh)
    generator = np.random.default_rng([experiment.config.seed, step, 2])
    rows = data.sample_rows(experiment.dataset.train, size, generator)
    own = sharding.local_rows(by_rows, size)
    return sharding.place_batch(Batch(*(field[own] for field in rows)), by_rows, size)


def design(experiment: Experiment) -> tuple[panel.PanelSettings, int]:
    """The settings, with no more rows than the batch has, and the rows of a group.

    A group has a row for each data-parallel device, if the batch has enough rows, else one.
    """
    settings = panel.PanelSettings(**experiment.config.panel)
    size, mesh = experiment.spec.batch_size, experiment.mesh
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    settings = dataclasses.replace(settings, rows=max(2, min(settings.rows, size)))
    return settings, ways if settings.rows * ways <= size else 1


def fewest_steps(experiment: Experiment) -> int:
    """Steps between measurements by their number of rows next to the batch's; 0: none are made.

    None if there is no noise of masks and levels, no second row for C, or a loss that is no sum of
    those of rows (``alignment.kto``).
    """
    settings, group = design(experiment)
    size = experiment.spec.batch_size
    if not settings.cost or experiment.config.process == "autoregressive" or size < 2:
        return 0
    if experiment.config.alignment.method == "kto":
        return 0
    return math.ceil(settings.passes(group) / (settings.cost * size))


def critical_batch(
    readings: Mapping[str, float], records: Sequence[Mapping[str, Any]], batch_size: int
) -> dict[str, float]:
    """The critical batch size, rows and eligible tokens, with the ends of two standard errors.

    Rows times the gradient's noise over its signal, the simple noise scale of McCandlish et al.
    2018. From the monitor ``gradient_noise`` where its signal exceeds two standard errors. As
    parameters move within ten steps, gradients that turn make the size too large, and gradients
    that shrink, as in the first steps of fine-tuning, too small: where no noise is left, none.
    Else from three measurements or more, at fixed parameters but of few rows; where their signal
    does not stand out either, the lower end alone.
    """
    names = ("gradient_noise", "gradient_signal", "gradient_signal_standard_error")
    figures = {}
    if all(name in readings for name in names):
        noise, *signal = (readings[name] for name in names)
        if signal[0] > 2 * signal[1]:
            figures = _noise_scale(batch_size * noise, *signal)
    if not figures and len(records) > 2:
        noise, signal = (
            mean_estimate(np.array([record[name] for record in records]))
            for name in ("total", "signal")
        )
        figures = _noise_scale(noise.value, *signal)
    tokens = readings.get("eligible_per_row")
    if tokens is not None:
        own = [(n.replace("rows", "tokens"), v * tokens) for n, v in figures.items()]
        figures |= dict(own)
    return figures


def _noise_scale(noise: float, signal: float, error: float) -> dict[str, float]:
    if not noise > 0 or not signal + 2 * error > 0:
        return {}
    figures = {"critical_batch_rows_low": noise / (signal + 2 * error)}
    if signal > 2 * error:
        figures["critical_batch_rows"] = noise / signal
        figures["critical_batch_rows_high"] = noise / (signal - 2 * error)
    return figures


def shown(figures: Mapping[str, float]) -> dict[str, str]:
    """Figures for one line of a terminal, the most important first."""
    text = {}
    for letter, name in zip("ABC", panel.PARTS):
        if f"share_{name}" in figures:
            error = figures.get(f"share_{name}_standard_error")
            shown_error = "" if error is None else f"±{100 * error:.0f}"
            text[letter] = f"{100 * figures[f'share_{name}']:.0f}{shown_error}%"
    if "critical_batch_rows_low" in figures:
        rows = figures.get("critical_batch_rows")
        low = f">{figures['critical_batch_rows_low']:,.0f}"
        text["critical batch"] = low if rows is None else whole_rows(rows)
    if "effective_sample_size" in figures:
        text["ESS"] = f"{100 * figures['effective_sample_size']:.0f}%"
        text["largest weight"] = f"{figures['largest_weight']:.1f}"
    return text


def whole_rows(rows: float) -> str:
    """A critical batch size; below one row, any batch has more signal than noise."""
    return f"{rows:,.0f}" if rows >= 1 else "<1"


def _whole(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _layout(batch: Batch) -> dict[str, Array]:
    """Shares of the positions that may be masked, are prompts, and are padding."""
    eligible, attended = jnp.asarray(batch.eligible), jnp.asarray(batch.documents) > 0
    return {
        "eligible": jnp.mean(eligible),
        "prompt": jnp.mean(attended & ~eligible),
        "padding": jnp.mean(~attended & ~eligible),
    }
