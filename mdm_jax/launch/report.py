"""What a finished run says: numbers next to baselines, samples, and where everything is."""

import pathlib
from typing import Any

import numpy as np

from mdm_jax import plots, training
from mdm_jax.launch.experiment import Experiment
from mdm_jax.launch.sample import format_samples


def write_report(
    experiment: Experiment, workdir: pathlib.Path, record: dict[str, Any], drawn: dict[str, Any]
) -> str:
    """Writes plots and ``report.txt``; returns the text (the file begins with the description).

    Args:
        experiment: the run.
        workdir: its directory.
        record: from ``run.evaluate``.
        drawn: from ``run.sample``.
    """
    unit = record["unit"]
    entropies = {
        f"{name} entropy": record[f"{name}_bits_per_unit"] for name in ("unigram", "bigram")
    }
    known = {name: value for name, value in entropies.items() if value is not None}
    curve, levels = workdir / "plots" / "training.png", workdir / "plots" / "levels.png"
    shown = [curve]
    records = training.read_metrics(workdir / "metrics.jsonl")
    plots.save(lambda axes: plots.training_curve(axes, records, unit, known), curve, (7, 4))
    over_rows = _number(record["data_standard_error_bits_per_unit"])
    if "levels" in record:
        edges = np.array(record["levels"]["masking_rate_edges"])
        nats = np.array(record["levels"]["nats_per_masked_token"], np.float64)
        plots.save(lambda axes: plots.level_curve(axes, edges, nats), levels, (5, 4))
        shown.append(levels)

    text = "\n".join(
        [
            f"held-out likelihood bound ({record['split']} split, {record['rows']} rows, "
            f"parameters of step {record['step']}):",
            f"  {_pm(record, 'bits_per_unit')} bits per {unit}"
            f"   (± Monte Carlo; over rows ± {over_rows})",
            f"  unigram entropy of the split {_number(entropies['unigram entropy'])}, "
            f"bigram entropy {_number(entropies['bigram entropy'])} bits per {unit}",
            *experiment.process.details(record),
            "",
            format_samples(drawn["samples"]).strip() if drawn["samples"] else "",
            "",
            f"samples:     {', '.join(drawn['files'])}",
            f"plots:       {', '.join(map(str, shown))}",
            f"TensorBoard: tensorboard --logdir {workdir / 'tensorboard'}",
            f"metrics:     {workdir / 'metrics.jsonl'}",
            f"checkpoint:  {workdir / 'checkpoints'}",
        ]
    )
    (workdir / "report.txt").write_text(f"{experiment.describe()}\n\n{text}\n", "utf-8")
    return text


def _pm(record: dict[str, Any], name: str) -> str:
    return f"{record[name]:.3f} ± {_number(record[f'standard_error_{name}'])}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"
