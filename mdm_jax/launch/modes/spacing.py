"""The mode ``spacing``: sampling grids of a trained run, compared and searched; the best is stored.

A grid is compared by the distance of what is sampled along it from held-out rows (of pictures the
Frechet distance, of texts the divergence of bigrams), and by the bound that steps lose (Align Your
Steps). The bound says little of samples: on N(0, 1) its best grid is worse than cosine's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax import data, files, rng
from mdm_jax.evaluation import quality
from mdm_jax.evaluation.ngrams import ngram_divergence
from mdm_jax.gaussian import samplers as search
from mdm_jax.gaussian.objective import scaled_integers
from mdm_jax.gaussian.samplers.step_search import IntervalCost
from mdm_jax.launch.build import Experiment, load_parameters, open_workdir
from mdm_jax.launch.families import Watch, grid_samplers
from mdm_jax.launch.gaussian_family import gaussian_recipe, open_levels
from mdm_jax.launch.workdir import writing
from mdm_jax.progress import progress_bar
from mdm_jax.schedules import grids
from mdm_jax.types import Array, PyTree

_COMPONENTS = 16
_CURVE_LEVELS = 49
_TOKEN_END = 12.0
"""logSNR of masking rates within 1e-5 of 0 and 1, in whose place grids of tokens have these."""


class _Problem(NamedTuple):
    """What is searched: ends of the grids, their form for the sampler, costs of an interval.

    ``cost`` and ``pairs`` are in nats per element, from a curve of losses (None: no such bound) and
    from pairs of noisy rows (None: too slow, or none).
    """

    low: float
    high: float
    open: Callable[[np.ndarray], Array]
    cost: IntervalCost | None
    pairs: IntervalCost | None


def compare(
    experiment: Experiment, workdir: files.Path, show: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Compare grids of ``sample.num_steps`` steps; shown, stored with the best, and returned.

    Grids are the rules of the process, the density that training learned, Align Your Steps by the
    curve of losses and by pairs, and a search for the least distance that begins at the best of
    these. Distances share random numbers; those of the search are others. ValueError for a process
    or sampler without a grid.
    """
    check(experiment)
    c, family = experiment.config, experiment.family
    num_steps = c.sample.num_steps
    step, params = load_parameters(experiment, workdir)
    key = experiment.key(step, "spacing")
    problem, distance = _problem(experiment, params, key), _distance(experiment, params)
    found = {rule: _closed(family.levels(rule, num_steps), problem) for rule in family.rules}
    learned = _learned(experiment, workdir, num_steps)
    if learned is not None:
        found["learned density"] = _closed(learned, problem)
    if num_steps > 1:
        start = np.linspace(problem.low, problem.high, num_steps + 1)
        if problem.cost is not None:
            start = search.align_steps(problem.cost, start, refinements=6).grid
            found["align steps, curve"] = start
        if problem.pairs is not None:
            few = {"refinements": 3, "candidates": 5, "max_sweeps": 2}
            found["align steps, pairs"] = search.align_steps(problem.pairs, start, **few).grid
    with progress_bar(None, "spacing", "sets of samples") as bar:

        def measured(grid: np.ndarray, key: Array) -> float:
            bar.update(1)
            return distance(problem.open(grid), key)

        if c.spacing.budget and num_steps > 1:

            def metric(grid: np.ndarray) -> float:
                return measured(grid, rng.stream(key, "search"))

            reach = (problem.high - problem.low) / (2 * num_steps)
            found["search"] = search.pattern_search(
                metric,
                min(found.values(), key=metric),
                c.spacing.budget,
                step=reach,
                smallest_step=reach / 16,
            ).grid
        keys = [jax.random.fold_in(key, i) for i in range(c.spacing.replicates)]
        results = {
            name: {
                "distances": [measured(grid, key) for key in keys],
                "bound": problem.cost and search.klub(problem.cost, grid),
                "bound_by_pairs": problem.pairs and search.klub(problem.pairs, grid),
                "levels": grid.tolist(),
            }
            for name, grid in found.items()
        }
    record = {
        "step": step,
        "sampler": c.sample.sampler,
        "num_steps": num_steps,
        "best": min(results, key=lambda name: np.mean(results[name]["distances"])),
        "grids": results,
    }
    show(table(record))
    path = _path(workdir, c.sample.sampler, num_steps)
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        files.write_json(path, record)
    return record | {"file": str(path)}


def check(experiment: Experiment) -> None:
    """Raise ValueError where there is no grid to compare."""
    c = experiment.config
    if experiment.family.levels is None:
        raise ValueError(f"process={c.process!r} has no noise levels, hence no grid to space")
    if not experiment.family.takes_steps:
        raise ValueError(
            f"{c.sample.sampler!r} sets its own number of steps, so that there is no grid to space;"
            " those that take one are "
            f"{', '.join(grid_samplers(c.sample))} (--config.sample.sampler)"
        )


def stored_generator(
    experiment: Experiment, workdir: files.Path, num_steps: int, watch: Watch = None
) -> tuple[Callable[..., Array], str]:
    """The configured sampler, along the grid stored in the run if ``sample.grid`` is empty.

    ``watch`` is as in ``Family.generator``.
    Returns it and where its grid is from, in words ("" if it takes none). ValueError for a damaged
    file.
    """
    c, family = experiment.config.sample, experiment.family
    path = _path(workdir, c.sampler, num_steps)
    stored = family.takes_steps and not c.grid and path.exists()
    if not stored:
        grid = (c.grid or "the default rule") if family.takes_steps else ""
        if watch is not None:
            return family.generator(num_steps, None, watch), grid
        # The experiment's own may be compiled.
        own = experiment.generate if num_steps == c.num_steps else family.generator(num_steps)
        return own, grid
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
    levels = _open(experiment)(levels)
    made = family.generator(num_steps, levels, watch)
    return made, f"{record['best']}, of {path}"


def table(record: dict[str, Any]) -> str:
    """The record as text: distances with their standard errors, best first, and bounds."""
    rows = sorted(record["grids"].items(), key=lambda item: np.mean(item[1]["distances"]))
    width = max(len(name) for name, _ in rows)
    best = np.asarray(rows[0][1]["distances"])
    lines = [f"{'grid':{width}}  distance ± s.e.    above the best    bound lost, nats/element"]
    for name, row in rows:
        values = np.asarray(row["distances"])
        scale = np.sqrt(values.size)
        above, error = np.mean(values - best), np.std(values - best, ddof=1) / scale
        bounds = [row[kind] for kind in ("bound", "bound_by_pairs") if row[kind] is not None]
        lines.append(
            f"{name:{width}}  {values.mean():.4f} ± {np.std(values, ddof=1) / scale:.4f}"
            f"   {above:.4f} ± {error:.4f}   " + ", ".join(f"{bound:.4f}" for bound in bounds)
        )
    return "\n".join(lines)


def _path(workdir: files.Path, sampler: str, num_steps: int) -> files.Path:
    return workdir / "spacing" / f"{sampler}-{num_steps}.json"


def _open(experiment: Experiment) -> Callable[[np.ndarray], Array]:
    """Levels between finite ends as the sampler takes them."""
    if experiment.config.process == "gaussian":
        law = experiment.objective.law
        return lambda levels: open_levels(levels, law)
    return grids.open_ends


def _closed(levels: Array, problem: _Problem) -> np.ndarray:
    """The levels with finite ends, float64."""
    return np.clip(np.asarray(levels, np.float64), problem.low, problem.high)


def _problem(experiment: Experiment, params: PyTree, key: Array) -> _Problem:
    c, dataset = experiment.config, experiment.dataset
    _, source = experiment.held_out
    opened, count = _open(experiment), min(c.spacing.rows, len(source))
    if c.process == "gaussian":
        g, recipe = c.gaussian, gaussian_recipe(c.gaussian)
        tokens = data.gather(source, np.arange(count)).tokens
        rows = scaled_integers(dataset.vocab_size - 1)(tokens)
        denoise = search.bind_denoiser(
            lambda *inputs: experiment.apply_fn(params, *inputs), recipe.output, recipe.path
        )
        levels, path = np.linspace(g.low, g.high, _CURVE_LEVELS), recipe.path
        curve = search.loss_curve(key, denoise, rows, levels, path=path) / dataset.length
        pairs = search.pair_cost(key, denoise, rows, path=path, data_std=g.sigma_data)
        return _Problem(
            g.low,
            g.high,
            opened,
            search.curve_cost(levels, curve),
            lambda noisy, clean: pairs(noisy, clean) / dataset.length,
        )
    cost = None
    if c.process != "uniform":  # its tokens are replaced, not revealed
        result = experiment.evaluate(params, key, experiment.batches(source, count))
        seen = result.levels.targets > 0
        middle = 0.5 * (result.levels.edges[1:] + result.levels.edges[:-1])
        cost = search.unmasking_cost(middle[seen], result.levels.nats[seen])
    return _Problem(-_TOKEN_END, _TOKEN_END, opened, cost, None)


def _learned(experiment: Experiment, workdir: files.Path, num_steps: int) -> Array | None:
    """Grid of equal shares of the density that training drew levels from; None if it was flat."""
    transform, num_levels = experiment.transform, experiment.spec.num_levels
    checkpoints = open_workdir(workdir)
    try:
        restored = checkpoints.restore_last_fields(experiment.abstract_state(), ("variance",))
    finally:
        checkpoints.close()
    if restored is None or transform.profile is None:
        return None
    state = restored.state

    def log_density(u: np.ndarray) -> np.ndarray:
        each = jnp.broadcast_to(jnp.asarray(u)[:, None], (u.size, num_levels))
        return np.log(np.exp(np.asarray(transform.profile(state.variance, each)[0])).mean(-1))

    if np.ptp(log_density(np.linspace(0.05, 0.95, 19))) == 0:
        return None
    return grids.from_log_density(log_density, num_steps, experiment.objective.law)


def _distance(experiment: Experiment, params: PyTree) -> Callable[[Array, Array], float]:
    """``distance(levels, key)`` of samples from held-out rows."""
    c, dataset = experiment.config.spacing, experiment.dataset
    _, source = experiment.held_out
    rows = data.gather(source, np.arange(min(2 * c.samples, len(source))))
    tokens, documents = np.asarray(rows.tokens), np.asarray(rows.documents)
    # Prompts are given; elsewhere every token is drawn.
    picked = np.arange(c.samples) % len(tokens)
    canvas = np.where(np.asarray(rows.eligible), dataset.mask_id, tokens)[picked].astype(np.int32)

    @jax.jit
    def draw(params: PyTree, key: Array, levels: Array) -> Array:
        generate = experiment.family.generator(levels.shape[0] - 1, levels)
        return generate(params, key, canvas, documents[picked])

    def drawn(levels: Array, key: Array) -> np.ndarray:
        return np.asarray(draw(params, key, jnp.asarray(levels, jnp.float32)))

    if dataset.tokenizer is None:
        top = dataset.vocab_size - 2
        train = data.gather(dataset.train, np.arange(min(4096, len(dataset.train)))).tokens / top
        space = quality.principal_space(train, min(_COMPONENTS, len(train) - 1))
        held_out = space.project(tokens / top)

        def distance(levels: Array, key: Array) -> float:
            return quality.frechet_distance(space.project(drawn(levels, key) / top), held_out)

    else:

        def distance(levels: Array, key: Array) -> float:
            valid = documents > 0
            return ngram_divergence(
                drawn(levels, key), tokens, 2, valid=valid[picked], held_out_valid=valid
            ).value

    return distance
