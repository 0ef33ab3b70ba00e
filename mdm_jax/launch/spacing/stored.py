"""Grids that ``mdm spacing`` stored in a run, and the sampler along them."""

from collections.abc import Callable
from typing import Any

import numpy as np

from mdm_jax import files
from mdm_jax.launch.build import Experiment
from mdm_jax.launch.processes.parts import Watch
from mdm_jax.launch.sampling.spread import spread
from mdm_jax.launch.spacing.problem import learned_levels, opening
from mdm_jax.launch.workdir import writing
from mdm_jax.schedules import grids


def path_of(workdir: files.Path, sampler: str, num_steps: int) -> files.Path:
    return workdir / "spacing" / f"{sampler}-{num_steps}.json"


def store(workdir: files.Path, record: dict[str, Any]) -> files.Path:
    """Write a record of ``compare``, with the levels of its grids; returns the file."""
    path = path_of(workdir, record["sampler"], record["num_steps"])
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        files.write_json(path, record)
    return path


def stored_records(workdir: files.Path, sampler: str, step: int) -> list[dict[str, Any]]:
    """Records of a sampler that :func:`store` wrote for the parameters of ``step``, by steps."""
    found = [files.read_json(p) for p in sorted((workdir / "spacing").glob(f"{sampler}-*.json"))]
    same = [r for r in found if (r.get("step"), r.get("sampler")) == (step, sampler)]
    return sorted(same, key=lambda record: record["num_steps"])


def stored_generator(
    experiment: Experiment, workdir: files.Path, num_steps: int, watch: Watch = None
) -> tuple[Callable[..., np.ndarray], str]:
    """The configured sampler over all devices, along the run's grid if ``sample.grid`` is empty.

    ``watch`` is as in ``Family.generator``.
    Returns it and where its grid is from, in words ("" if it takes none). ValueError for a damaged
    file.
    """
    c, family = experiment.config.sample, experiment.family
    path = path_of(workdir, c.sampler, num_steps)
    own = c.grid or c.restore_from is not None  # which begins at a level of its own
    stored = family.takes_steps and not own and path.exists()
    if family.follows_warp and not c.grid and not stored:
        levels = learned_levels(experiment, workdir, num_steps)
        if levels is not None:
            made = spread(family.generator(num_steps, levels, watch))
            return made, "equal shares of the learned density"
    if not stored:
        grid = (c.grid or "the default rule") if family.takes_steps else ""
        if watch is not None:
            return spread(family.generator(num_steps, None, watch)), grid
        # The experiment's own may be compiled.
        same = experiment.generate if num_steps == c.num_steps else family.generator(num_steps)
        return spread(same), grid
    try:
        record = files.read_json(path)
        levels = np.asarray(record["grids"][record["best"]]["levels"], np.float64)
        grids.check_grid(levels)
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error).removeprefix(f"{path} is damaged: ")
        raise ValueError(
            f"{path} is damaged ({reason}); write it anew with mdm spacing --steps={num_steps}, or "
            "name a grid with --config.sample.grid"
        ) from error
    levels = opening(experiment)(levels)
    made = spread(family.generator(num_steps, levels, watch))
    return made, f"{record['best']}, of {path}"
