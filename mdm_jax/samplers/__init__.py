"""Reverse processes, masked and Gaussian: one loop each, interchangeable samplers."""

from mdm_jax.samplers.ancestral import ancestral, cached_ancestral, first_hitting
from mdm_jax.samplers.blocks import make_block_generator, sample_blocks
from mdm_jax.samplers.by_score import (
    Score,
    by_score,
    by_score_along_grid,
    confidence,
    confidence_parallel,
    entropy_bounded,
    low_confidence_remasking,
    margin,
    negative_entropy,
    random_remasking,
)
from mdm_jax.samplers.caching import (
    ApproximateCache,
    approximately_cached,
    make_cached_generator,
)
from mdm_jax.samplers.canvas import blank_canvas, canvas_like, canvas_with_gaps, prompt_canvas
from mdm_jax.samplers.filters import LogitFilter, compose, draw_tokens, temperature, top_k, top_p
from mdm_jax.samplers.next_token import make_next_token_generator, sample_next_tokens
from mdm_jax.samplers.remasking import (
    predictor_corrector,
    remdm_cap,
    remdm_confidence,
    remdm_loop,
    remdm_rescale,
)
from mdm_jax.samplers.sampler import (
    SAMPLER_LABELS,
    Progress,
    Sampler,
    SamplerState,
    Show,
    StepContext,
    make_generator,
    sample,
    sample_with_trace,
)
from mdm_jax.samplers.stream import FinishedRow, Row, make_stream
from mdm_jax.samplers.uniform import uniform_ancestral, uniform_corrected
from mdm_jax.samplers.wrappers import (
    DenoiseWrapper,
    counted,
    no_repeat_ngrams,
    prompt_guidance,
    self_conditioned,
    shown,
    stopping_at,
    wrapped,
)
