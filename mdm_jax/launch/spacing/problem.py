"""What grids of a trained run are judged by: costs of their steps, and samples along them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax import data, files
from mdm_jax.evaluation import quality
from mdm_jax.evaluation.ngrams import ngram_divergence
from mdm_jax.gaussian import samplers as search
from mdm_jax.gaussian.objective import scaled_integers
from mdm_jax.gaussian.samplers.step_search import IntervalCost
from mdm_jax.launch.build import Experiment, open_workdir
from mdm_jax.launch.gaussian_family import gaussian_recipe, open_levels
from mdm_jax.schedules import grids
from mdm_jax.types import Array, PyTree

_COMPONENTS = 16
_CURVE_LEVELS = 49
_PAIRED_ROWS = 64
_TOKEN_END = 12.0
"""logSNR of masking rates within 1e-5 of 0 and 1, in whose place grids of tokens have these."""


class Problem(NamedTuple):
    """What is searched: ends of the grids, their form for the sampler, costs of an interval.

    ``cost`` and ``pairs`` are in nats per element, from a curve of losses (None: no such bound) and
    from pairs of noisy rows (None: too slow, or none). ``curve``: levels [K] and errors of eps [K].
    """

    low: float
    high: float
    open: Callable[[np.ndarray], Array]
    cost: IntervalCost | None
    pairs: IntervalCost | None
    curve: tuple[np.ndarray, np.ndarray] | None = None

    def closed(self, levels: Array) -> np.ndarray:
        """The levels with finite ends, float64."""
        return np.clip(np.asarray(levels, np.float64), self.low, self.high)


def make_problem(experiment: Experiment, params: PyTree, key: Array) -> Problem:
    """The problem of a run under these parameters; measures a curve of losses."""
    c, dataset = experiment.config, experiment.dataset
    _, source = experiment.held_out
    opened, count = opening(experiment), min(c.spacing.rows, len(source))
    if c.process == "gaussian":
        g, recipe = c.gaussian, gaussian_recipe(c.gaussian, dataset)
        rows = data.gather(source, np.arange(count))
        pictures = scaled_integers(dataset.vocab_size - 1)(rows.tokens)

        def bound(documents: np.ndarray) -> search.Denoise:
            return search.bind_denoiser(
                lambda *inputs: experiment.apply_fn(params, *inputs),
                recipe.output,
                recipe.path,
                documents,
            )

        levels, path = np.linspace(g.low, g.high, _CURVE_LEVELS), recipe.path
        curve = search.loss_curve(key, bound(rows.documents), pictures, levels, path=path)
        curve = curve / dataset.length
        few = slice(min(count, _PAIRED_ROWS))
        pairs = search.pair_cost(
            key, bound(rows.documents[few]), pictures[few], path=path, data_std=g.sigma_data
        )
        return Problem(
            g.low,
            g.high,
            opened,
            search.curve_cost(levels, curve),
            lambda noisy, clean: pairs(noisy, clean) / dataset.length,
            (levels, curve),
        )
    if c.process == "cdcd":
        return Problem(c.gaussian.low, c.gaussian.high, opened, None, None)
    cost = None
    if c.process != "uniform":  # its tokens are replaced, not revealed
        result = experiment.evaluate(params, key, experiment.batches(source, count))
        seen = result.levels.targets > 0
        middle = 0.5 * (result.levels.edges[1:] + result.levels.edges[:-1])
        cost = search.unmasking_cost(middle[seen], result.levels.nats[seen])
    return Problem(-_TOKEN_END, _TOKEN_END, opened, cost, None)


def opening(experiment: Experiment) -> Callable[[np.ndarray], Array]:
    """Levels between finite ends as the sampler takes them."""
    if experiment.config.process in ("gaussian", "cdcd"):
        law = experiment.objective.law
        return lambda levels: open_levels(levels, law)
    return grids.open_ends


def learned_density(experiment: Experiment, workdir: files.Path) -> Callable[[int], Array] | None:
    """``grid(num_steps)`` of equal shares of the density that training drew levels from.

    None if it was flat.
    """
    densities = _learned_densities(experiment, workdir)
    if densities is None:
        return None

    def log_density(u: np.ndarray) -> np.ndarray:
        return np.log(np.exp(densities(u)).mean(-1))

    if np.ptp(log_density(np.linspace(0.05, 0.95, 19))) == 0:
        return None
    law = experiment.objective.law
    return lambda num_steps: grids.from_log_density(log_density, num_steps, law)


def learned_levels(
    experiment: Experiment, workdir: files.Path, num_steps: int
) -> np.ndarray | None:
    """:func:`learned_density` as the sampler takes it, [n + 1], or of S levels each [n + 1, S].

    None before training.
    """
    densities = _learned_densities(experiment, workdir)
    if densities is None:
        return None
    law = experiment.objective.law
    each = [
        open_levels(grids.from_log_density(lambda u, s=s: densities(u)[:, s], num_steps, law), law)
        for s in range(experiment.spec.num_levels)
    ]
    return each[0] if len(each) == 1 else np.stack(each, axis=-1)


def _learned_densities(
    experiment: Experiment, workdir: files.Path
) -> Callable[[np.ndarray], np.ndarray] | None:
    """``log_density(u [N]) -> [N, S]`` that training drew each level from; None before training."""
    transform, num_levels = experiment.transform, experiment.spec.num_levels
    checkpoints = open_workdir(workdir)
    try:
        restored = checkpoints.restore_last_fields(experiment.abstract_state(), ("variance",))
    finally:
        checkpoints.close()
    if restored is None or transform.profile is None:
        return None
    profile, state = jax.jit(transform.profile), restored.state.variance

    def log_density(u: np.ndarray) -> np.ndarray:
        each = jnp.broadcast_to(jnp.asarray(u)[:, None], (u.size, num_levels))
        return np.asarray(profile(state, each)[0])

    return log_density


class Samples(NamedTuple):
    """Samples along a grid, and what is said of them.

    Attributes:
        draw: ``draw(levels, key) -> tokens [spacing.samples, L]``.
        distance: of tokens from held-out rows: of pictures the Frechet distance, of texts the
            divergence of bigrams, nats.
        reference: the distance of as many training rows.
        quality: further figures of texts; {} of pictures.
    """

    draw: Callable[[Array, Array], np.ndarray]
    distance: Callable[[np.ndarray], float]
    reference: float
    quality: Callable[[np.ndarray], dict[str, Any]]


def make_samples(
    experiment: Experiment, params: PyTree, score: quality.Score | None = None
) -> Samples:
    """Samples of the configured sampler; ``score``: of another model, for their perplexity."""
    c, dataset = experiment.config.spacing, experiment.dataset
    _, source = experiment.held_out
    rows = data.gather(source, np.arange(min(2 * c.samples, len(source))))
    tokens, documents = np.asarray(rows.tokens), np.asarray(rows.documents)
    # Prompts are given, and classes; elsewhere every token is drawn.
    picked = np.arange(c.samples) % len(tokens)
    canvas = np.where(np.asarray(rows.eligible), dataset.mask_id, tokens)[picked].astype(np.int32)
    trained = data.gather(dataset.train, np.arange(min(4096, len(dataset.train))))
    some = np.arange(c.samples) % len(trained.tokens)

    @jax.jit
    def generate(params: PyTree, key: Array, levels: Array) -> Array:
        own = experiment.family.generator(levels.shape[0] - 1, levels)
        return own(params, key, canvas, documents[picked])

    def draw(levels: Array, key: Array) -> np.ndarray:
        return np.asarray(generate(params, key, jnp.asarray(levels, jnp.float32)))

    if dataset.tokenizer is None:
        top = dataset.vocab_size - 2
        train = trained.tokens / top
        space = quality.principal_space(train, min(_COMPONENTS, len(train) - 1))
        held_out = space.project(tokens / top)

        def frechet(tokens: np.ndarray) -> float:
            return quality.frechet_distance(space.project(tokens / top), held_out)

        return Samples(draw, frechet, frechet(trained.tokens[some]), lambda _: {})
    valid = documents > 0

    def divergence(texts: np.ndarray, seen: np.ndarray = valid[picked]) -> float:
        return ngram_divergence(texts, tokens, 2, valid=seen, held_out_valid=valid).value

    def figures(texts: np.ndarray) -> dict[str, Any]:
        found = quality.measure_text_quality(
            texts, valid[picked], orders=(2,), score=score, max_bleu_texts=2
        )
        return found.to_dict()

    reference = divergence(trained.tokens[some], trained.documents[some] > 0)
    return Samples(draw, divergence, reference, figures)
