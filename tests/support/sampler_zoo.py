"""Every sampler of masked diffusion in one list; a new one joins all property tests by one line."""

import numpy as np

from mdm_jax import samplers
from mdm_jax.samplers.ancestral import cached_ancestral
from mdm_jax.samplers.by_score import (
    by_score,
    by_score_along_grid,
    entropy_bounded,
    low_confidence_remasking,
    random_remasking,
)
from mdm_jax.samplers.remasking import (
    predictor_corrector,
    remdm_cap,
    remdm_confidence,
    remdm_loop,
    remdm_rescale,
)
from mdm_jax.samplers.wrappers import no_repeat_ngrams, prompt_guidance, wrapped
from mdm_jax.schedules import grids, masked

UNIFORM = np.asarray(grids.uniform_masking_rate(5))
COSINE = np.asarray(grids.cosine(masked.linear(), 4))
NUCLEUS = samplers.compose(samplers.temperature(0.7), samplers.top_p(0.95))

ZOO = {
    "ancestral": (samplers.ancestral(), UNIFORM),
    "ancestral_cosine": (samplers.ancestral(NUCLEUS), COSINE),
    "cached_ancestral": (cached_ancestral(3), UNIFORM),
    "first_hitting": (samplers.first_hitting(), None),
    "by_confidence": (by_score(samplers.confidence, 2), None),
    "by_margin_in_turn": (by_score(samplers.margin, (3, 1, 2)), None),
    "by_entropy_greedy": (by_score(samplers.negative_entropy, 1, samplers.temperature(0.0)), None),
    "by_score_along_grid": (by_score_along_grid(), COSINE),
    "entropy_bounded": (entropy_bounded(1.5, NUCLEUS), None),
    "low_confidence_remasking": (low_confidence_remasking(3, 2), None),
    "random_remasking": (random_remasking(4, 3), None),
    "confidence_parallel": (samplers.confidence_parallel(3, 0.4), None),
    "remdm_cap": (remdm_cap(0.3), UNIFORM),
    "remdm_rescale": (remdm_rescale(0.5), COSINE),
    "remdm_confidence": (remdm_confidence(), UNIFORM),
    "remdm_loop": (remdm_loop(0.4, 0.7, 0.3, 0.6), UNIFORM),
    "predictor_corrector": (predictor_corrector(1, 0.4), UNIFORM),
    "wrapped": (
        wrapped(cached_ancestral(3), prompt_guidance(2.0), no_repeat_ngrams(2)),
        UNIFORM,
    ),
}
"""Name -> (sampler, grid)."""

REMASKING = (
    "remdm_cap",
    "remdm_rescale",
    "remdm_confidence",
    "remdm_loop",
    "predictor_corrector",
)
"""Members that may put a mask back."""

SIBLINGS = (
    "ancestral",  # cached_ancestral draws the same tokens
    "cached_ancestral",  # wrapped is made of it
    "ancestral_cosine",
    "by_confidence",
    "by_margin_in_turn",
    "by_score_along_grid",
    "random_remasking",
    "confidence_parallel",
    "remdm_confidence",
    "remdm_rescale",
)
"""Members that share the step of another one, for the slow suite."""

DETERMINISTIC = ("by_entropy_greedy",)
EXACT = ("first_hitting",)
DISCRETISED = ("ancestral", "ancestral_cosine", "cached_ancestral", "wrapped")
"""Labels of the members; all others are biased."""
