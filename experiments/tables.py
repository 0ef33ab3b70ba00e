"""Diffusion of a small table of mixed types: noise warps of three kinds, side by side (CDTD).

    python -m experiments.tables --workdir=runs/tables [--warps=column,type,shared] [--seeds=0,1]

Every run is ``--config=table_cdtd:WARP``; stopped ones resume. As many rows as the test split has
are drawn several times and set beside it. The table, ``tables.md`` and ``tables.json`` in the
workdir, holds

* a classifier two-sample test (Lopez-Paz & Oquab 2017): the accuracy, cross-validated, of a random
  forest that tells drawn rows from test rows, 0.5 where it cannot. The interval is Wilson's for as
  many rows as one comparison has, so it does not shrink with the number of draws: the test rows are
  the same ones. It takes the rows' outcomes as independent, which those of one fold are not quite;
* marginals: the mean over numeric columns of the Wasserstein-1 distance in standard deviations, and
  over categorical ones of the total variation;
* correlations: the mean absolute difference over pairs of numeric columns;
* copies: the median distance of drawn rows from the nearest training row, over that of test rows;
  far below 1 where training rows are learned by heart.

Beside the models stand training rows themselves, and rows whose columns are drawn from the training
rows one by one: what a perfect model and one without any dependence would score.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from scipy import stats

from mdm_jax import data, rng
from mdm_jax.data.tables import Column, decoded
from mdm_jax.data.tokenizers import printable
from mdm_jax.launch import command_line, presets
from mdm_jax.launch.build import Experiment, load_parameters, make_experiment
from mdm_jax.launch.modes import train
from mdm_jax.launch.spacing.stored import stored_generator
from mdm_jax.launch.workdir import WorkdirError, write_json
from mdm_jax.training.checkpoints import CheckpointError
from mdm_jax.training.loop import TrainingStopped

WARPS = ("column", "type", "shared")


def main() -> int:
    """Trains, draws, compares, and prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description="Noise warps of a mixed table, side by side.")
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="of all runs")
    parser.add_argument("--warps", default=",".join(WARPS), help="which, with commas")
    parser.add_argument("--seeds", default="0", help="of the runs, with commas")
    parser.add_argument("--draws", type=int, default=5, help="comparisons of a run")
    parser.add_argument("--smoke", action="store_true", help="tiny network and a few steps")
    options = parser.parse_args()
    logging.set_verbosity(logging.WARNING)
    command_line.use_compilation_cache(None)  # seeds of a warp share its program
    seeds = [int(seed) for seed in options.seeds.split(",")]
    records: dict[str, Any] = {}
    for warp in options.warps.split(","):
        figures = []
        for seed in seeds:
            try:
                config = presets.get_config(f"table_cdtd:{'smoke' if options.smoke else warp}")
                config.variance.cdtd_warp.groups = presets.table_cdtd(
                    warp
                ).variance.cdtd_warp.groups
                config.seed = seed
                experiment = make_experiment(config)
                workdir = options.workdir / f"{warp}-{seed}"
                print(f"--- warp {warp}, seed {seed}", flush=True)
                if not train.train(experiment, workdir):
                    print(f"stopped and saved in {workdir}; the same command resumes")
                    return 130
                drawn = draw(experiment, workdir, options.draws)
            except (ValueError, OSError, WorkdirError, CheckpointError, TrainingStopped) as error:
                print(f"error: {printable(str(error))}", file=sys.stderr)
                return 2
            figures += [compare(experiment.dataset, codes, n) for n, codes in enumerate(drawn)]
        records[f"one warp per {warp}" if warp != "shared" else "one warp"] = mean(figures)
    records |= references(experiment.dataset, options.draws)
    write_json(options.workdir / "tables.json", records)
    text = table(records)
    (options.workdir / "tables.md").write_text(text, "utf-8")
    print(text)
    return 0


def draw(experiment: Experiment, workdir: pathlib.Path, draws: int) -> list[np.ndarray]:
    """Codes [test rows, L] of a finished run, drawn ``draws`` times."""
    step, params = load_parameters(experiment, workdir)
    count = experiment.config.sample.num_steps
    generate, _ = stored_generator(experiment, workdir, count)
    canvas = np.zeros((len(experiment.dataset.test), experiment.dataset.length), np.int32)
    key = experiment.key(step, "tables")
    return [
        np.asarray(generate(params, rng.stream(key, f"draw {i}"), canvas)) for i in range(draws)
    ]


def references(dataset: data.Dataset, draws: int) -> dict[str, Any]:
    """The figures of training rows, and of columns drawn from them one by one."""
    generator, train_rows = np.random.default_rng(0), codes_of(dataset.train)
    count, length = len(dataset.test), dataset.length
    same, apart = [], []
    for number in range(draws):
        rows = train_rows[generator.permutation(len(train_rows))[:count]]
        same.append(compare(dataset, rows, number))
        index = generator.integers(len(train_rows), size=(count, length))
        apart.append(compare(dataset, train_rows[index, np.arange(length)], number))
    return {"training rows": mean(same), "columns drawn one by one": mean(apart)}


def compare(dataset: data.Dataset, codes: np.ndarray, seed: int) -> dict[str, float]:
    """All figures of drawn rows beside the test rows."""
    columns, test = dataset.columns, codes_of(dataset.test)
    drawn, held_out = (decoded(columns, rows) for rows in (codes, test))
    numeric = [c for c in columns if c.is_numeric]
    distances = [
        stats.wasserstein_distance(drawn[c.name] / c.std, held_out[c.name] / c.std) for c in numeric
    ]
    variations = [
        0.5
        * sum(
            abs(np.mean(drawn[c.name] == k) - np.mean(held_out[c.name] == k)) for k in c.categories
        )
        for c in columns
        if not c.is_numeric
    ]
    upper = np.triu_indices(len(numeric), 1)
    pairs = [np.corrcoef([rows[c.name] for c in numeric])[upper] for rows in (drawn, held_out)]
    known = features(columns, codes_of(dataset.train))
    nearest = [np.median(nearest_distance(features(columns, r), known)) for r in (codes, test)]
    return {
        "accuracy": two_sample_accuracy(features(columns, codes), features(columns, test), seed),
        "rows": float(len(codes) + len(test)),
        "wasserstein": float(np.mean(distances)),
        "total_variation": float(np.mean(variations)),
        "correlations": float(np.mean(abs(pairs[0] - pairs[1]))),
        "nearest": float(nearest[0] / nearest[1]),
    }


def two_sample_accuracy(first: np.ndarray, second: np.ndarray, seed: int) -> float:
    """Cross-validated accuracy of a random forest that tells rows [N, F] from others [M, F]."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    rows = np.concatenate([first, second])
    labels = np.repeat([0, 1], [len(first), len(second)])
    forest = RandomForestClassifier(100, min_samples_leaf=2, random_state=seed)
    folds = StratifiedKFold(min(10, len(first)), shuffle=True, random_state=seed)
    return float(np.mean(cross_val_predict(forest, rows, labels, cv=folds) == labels))


def features(columns: Sequence[Column], codes: np.ndarray) -> np.ndarray:
    """[N, F] standardised numbers and one-hot categories."""
    parts = []
    for i, column in enumerate(columns):
        if column.is_numeric:
            parts.append((column.decode(codes[:, i]) - column.mean)[:, None] / column.std)
        else:
            parts.append(np.eye(len(column.categories))[codes[:, i]])
    return np.concatenate(parts, axis=1)


def nearest_distance(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[N] Euclidean distance of each row to the nearest of the others."""
    return np.sqrt(np.square(rows[:, None] - others[None]).sum(-1)).min(1)


def codes_of(source: data.RowSource) -> np.ndarray:
    return np.asarray(data.gather(source, np.arange(len(source))).tokens)


def mean(figures: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Means over comparisons, and the interval of the accuracy."""
    found = {name: float(np.mean([f[name] for f in figures])) for name in figures[0]}
    rows = round(found["rows"])
    ends = stats.binomtest(round(found["accuracy"] * rows), rows).proportion_ci(method="wilson")
    return found | {"interval": [float(ends.low), float(ends.high)], "comparisons": len(figures)}


def table(records: dict[str, dict[str, Any]]) -> str:
    """The records as a Markdown table."""
    lines = [
        "| rows | told from test rows (95 %) | Wasserstein-1 | total variation | correlations | "
        "copies |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in records.items():
        low, high = r["interval"]
        lines.append(
            f"| {name} | {r['accuracy']:.3f} ({low:.2f} to {high:.2f}) | {r['wasserstein']:.3f} | "
            f"{r['total_variation']:.3f} | {r['correlations']:.3f} | {r['nearest']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
