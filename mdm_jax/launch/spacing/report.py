"""Tables and plots of compared grids."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax import files, plots
from mdm_jax.launch.build import Experiment
from mdm_jax.launch.spacing.problem import Problem
from mdm_jax.launch.workdir import writing
from mdm_jax.types import Array, PyTree

_SHOWN_STEPS = 8
"""Pictures are shown along grids of the largest compared number of steps up to this."""
_TEXT_FIGURES = {"token_entropy": "entropy of a text, nats", "generative_perplexity": "perplexity"}


def table(record: dict[str, Any]) -> str:
    """A record as text: distances with their standard errors, best first, and bounds."""
    rows = sorted(record["grids"].items(), key=lambda item: np.mean(item[1]["distances"]))
    width = max(len(name) for name, _ in rows)
    best = np.asarray(rows[0][1]["distances"])
    texts = [name for name in _TEXT_FIGURES if rows[0][1]["quality"].get(name) is not None]
    lines = [
        f"{'grid':{width}}  distance ± s.e.    above the best    bound lost, nats/element"
        + "".join(f"    {_TEXT_FIGURES[name]}" for name in texts)
    ]
    for name, row in rows:
        values = np.asarray(row["distances"])
        above, error = np.mean(values - best), _error(values - best)
        bounds = [row[kind] for kind in ("bound", "bound_by_pairs") if row[kind] is not None]
        lines.append(
            f"{name:{width}}  {values.mean():.4f} ± {_error(values):.4f}"
            f"   {above:.4f} ± {error:.4f}   "
            + ", ".join(f"{bound:.4f}" for bound in bounds)
            + "".join(f"    {row['quality'][kind]:.3f}" for kind in texts)
        )
    return "\n".join(lines)


def summary(records: Sequence[dict[str, Any]]) -> str:
    """Distances by steps, Markdown: of each sampler the best rule, search and best grid."""
    steps = list(dict.fromkeys(record["num_steps"] for record in records))
    lines = ["| sampler | grid | " + " | ".join(f"{n} steps" for n in steps) + " |"]
    lines.append("|" + "---|" * (len(steps) + 2))
    for sampler in dict.fromkeys(record["sampler"] for record in records):
        own = {r["num_steps"]: r["grids"] for r in records if r["sampler"] == sampler}
        for name in dict.fromkeys(name for grids in own.values() for name in grids):
            cells = [_cell(own[n][name]) if name in own[n] else "-" for n in steps]
            lines.append(f"| {sampler} | {name} | " + " | ".join(cells) + " |")
    reference = records[0]["reference"]
    return "\n".join([*lines, f"as many training rows: {reference:.4f}"])


def draw(
    experiment: Experiment,
    params: PyTree,
    problem: Problem,
    records: Sequence[dict[str, Any]],
    workdir: files.Path,
) -> list[files.Path]:
    """Plots of one sampler: distances by steps, levels by step, pictures along the grids."""
    sampler = experiment.config.sample.sampler
    points = [
        {
            "grid": name,
            "num_steps": record["num_steps"],
            "quality": {
                "distance": float(np.mean(row["distances"])),
                "distance_standard_error": _error(row["distances"]),
            },
        }
        for record in records
        for name, row in record["grids"].items()
    ]
    paths = [workdir / "spacing" / f"{sampler}-{name}.png" for name in ("distance", "grids")]
    with writing(paths[0]):
        reference = records[0]["reference"]

        def distances(axes: Any) -> Any:
            """Over the steps, both axes logarithmic."""
            plots.quality_curve(axes, points, "distance", by="grid", reference=reference)
            axes.set_yscale("log")
            return axes

        plots.save(distances, paths[0], (7, 5.5))
        panels = {record["num_steps"]: record["grids"] for record in records}
        levels = {n: {k: row["levels"] for k, row in g.items()} for n, g in panels.items()}
        plots.write(plots.grid_panels(levels), paths[1])
    if experiment.dataset.tokenizer is None:
        counts = [record["num_steps"] for record in records]
        chosen = max((n for n in counts if n <= _SHOWN_STEPS), default=min(counts))
        paths.append(workdir / "spacing" / f"{sampler}-pictures-{chosen}.png")
        frames = _frames(experiment, params, problem)
        rows = {name: frames(grid) for name, grid in levels[chosen].items()}
        with writing(paths[-1]):
            plots.write(plots.picture_paths(rows), paths[-1])
    return paths


def _frames(
    experiment: Experiment, params: PyTree, problem: Problem
) -> Callable[[Sequence[float]], np.ndarray]:
    """``frames(levels)``: a picture [steps, H, W] after each step, for all grids of one noise."""
    dataset, job, seen = experiment.dataset, experiment.jobs[0], []
    watch = (lambda tokens: seen.append(np.array(tokens[0]))), True

    @jax.jit  # one program for all grids of a length
    def run(params: PyTree, levels: Array) -> Array:
        generate = experiment.family.generator(levels.shape[0] - 1, levels, watch)
        return generate(params, jax.random.key(0), job.canvas[None], job.documents[None])

    def frames(levels: Sequence[float]) -> np.ndarray:
        seen.clear()
        run(params, jnp.asarray(problem.open(np.asarray(levels)), jnp.float32))
        jax.effects_barrier()
        top, tokens = dataset.mask_id - 1, np.stack(seen)
        values = np.where(tokens > top, 0.5, tokens / top)
        return values.reshape(len(seen), *dataset.event_shape)

    return frames


def _error(values: Any) -> float:
    """Standard error of a mean."""
    values = np.asarray(values)
    return float(np.std(values, ddof=1) / np.sqrt(values.size))


def _cell(row: dict[str, Any]) -> str:
    return f"{np.mean(row['distances']):.4f} ± {_error(row['distances']):.4f}"
