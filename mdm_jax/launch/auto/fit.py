"""``mdm variance --fit``: the curve of P-POTS, measured on a run's model and data, and stored."""

import re
import shlex
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from mdm_jax import data, files, meter, plots, variance
from mdm_jax.launch.build import Experiment
from mdm_jax.launch.command_line import MODES, take_config, without
from mdm_jax.launch.modes import measure
from mdm_jax.launch.names import fitted
from mdm_jax.launch.workdir import WorkdirError, write_json, writing
from mdm_jax.meter.levels import LevelTable
from mdm_jax.meter.subject import Subject
from mdm_jax.progress import progress_bar
from mdm_jax.variance.ppots import EprFit

FIT = flags.DEFINE_bool(
    "fit", False, "variance: measure the run's losses by level, fit the curve of P-POTS to them."
)
FILE = "epr.json"
ORDER = ("ppots_parametric",)
_REPLACED = re.compile(
    r"--?(config\.(variance\.(order|ppots_parametric)|measure)|(no)?(fit|allow_config_change))\b"
)


def fit(
    experiment: Experiment, workdir: files.Path, show: Callable[[str], None] = lambda _: None
) -> list[str]:
    """Measure mean and pattern variance of the loss on a grid, fit, show, store; the files.

    Parameters are those of the last checkpoint, or fresh; levels ``j / (N + 1)``, j = 1..N, of the
    law's distribution, all for the same rows (``measure.fit``). ``show`` gets the divergence and
    the command that trains with the curve. WorkdirError if ``variance/epr.json`` exists; ValueError
    for a run without noise, and as of ``fit_epr``.
    """
    path = workdir / "variance" / FILE
    if path.exists():
        raise WorkdirError(
            f"{path} holds a curve that was fitted before; rename or remove it to fit another"
        )
    own = experiment.config.measure
    experiment, step, params, _ = measure.parameters(experiment, workdir)
    table = _table(experiment, params, chunk=own.chunk, **own.fit)
    curve = fitted(table)
    # As many digits as are printed, so that the file, the command and the density agree.
    curve = curve._replace(parameters=type(curve.parameters)(*map(_rounded, curve.parameters)))
    line = training_command(workdir, curve)
    show(
        f"loss by masking rate of {measure.origin(experiment, step)}: {table.rows} rows, "
        f"{len(table.masking_rates)} levels, {table.masks_per_level} masks each\n"
        f"the curve of P-POTS, KL(measured || fitted) = {curve.divergence:.2g} nats:\n"
        + "\n".join(f"  {k} {v:g}" for k, v in curve.parameters._asdict().items())
        + f"\ntrains with it:\n  {line}"
    )
    record = {
        "step": step,
        "parameters": curve.parameters._asdict(),
        "divergence": curve.divergence,
        "corruption": experiment.objective.corruption.name,
        "levels_from": experiment.family.levels_from,
        "command": line,
        "levels": table.to_dict(),
    }
    picture = path.with_suffix(".png")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        axis = experiment.family.noise_axis
        plots.save(lambda axes: plots.fitted_curve(axes, table, curve, axis), picture, (6.4, 4.4))
        write_json(path, record)
    return [str(path), str(picture)]


def _table(
    experiment: Experiment, params: Any, *, levels: int, rows: int, masks: int, chunk: int
) -> LevelTable:
    objective = experiment.objective
    estimator = meter.make_estimator(experiment.apply_fn, objective)
    spec = objective.spec(experiment.spec.batch_size, experiment.dataset.length)
    identity = variance.identity()
    quantiles = 1 - jnp.arange(1, levels + 1) / (levels + 1)
    rates = np.asarray(jax.nn.sigmoid(-objective.law.icdf(quantiles)), np.float64)
    generator = np.random.default_rng(experiment.config.seed)
    with progress_bar(rows * levels * masks, unit="losses") as bar:
        return meter.measure_levels(
            Subject(estimator, params, identity, identity.init(spec), spec),
            data.sample_rows(experiment.dataset.train, rows, generator),
            experiment.key(0, "fit"),
            masking_rates=rates,
            masks_per_level=masks,
            chunk=chunk,
            progress=bar.update,
        )


def training_command(workdir: files.Path, curve: EprFit) -> str:
    """The line for a shell that trains a run like that of ``workdir`` with the curve.

    Its config and settings are those that the run was started with; the new run is beside it. The
    curve's settings alone for a run that no command of ours with a config started.
    """
    parameters = ",".join(f"{value:g}" for value in curve.parameters)
    settings = f'--config.variance.order="{ORDER}" --config.variance.{ORDER[0]}.parameters='
    settings += f'"({parameters})"'
    words = shlex.split(files.read_json(workdir / "run.json")["command"])
    start = 1 if words[0] == "mdm" else 3  # python -m package
    words, start = words[start:], words[:start]
    words = [word for word in words if word not in MODES and not _REPLACED.match(word)]
    config, kept = take_config(without(words, ("workdir", "mode")))
    if config is None:
        return settings
    line = [*start, "train", f"--config={config}", *kept, f"--workdir={workdir}-ppots"]
    return f"{shlex.join(line)} {settings}"


def _rounded(value: float) -> float:
    return float(f"{value:g}")
