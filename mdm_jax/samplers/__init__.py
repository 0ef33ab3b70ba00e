"""Reverse processes: one loop, interchangeable samplers, composable token filters."""

from mdm_jax.samplers.ancestral import ancestral as ancestral
from mdm_jax.samplers.filters import LogitFilter as LogitFilter
from mdm_jax.samplers.filters import compose as compose
from mdm_jax.samplers.filters import draw_tokens as draw_tokens
from mdm_jax.samplers.filters import temperature as temperature
from mdm_jax.samplers.filters import top_k as top_k
from mdm_jax.samplers.filters import top_p as top_p
from mdm_jax.samplers.first_hitting import first_hitting as first_hitting
from mdm_jax.samplers.sampler import Sampler as Sampler
from mdm_jax.samplers.sampler import SamplerState as SamplerState
from mdm_jax.samplers.sampler import StepContext as StepContext
from mdm_jax.samplers.sampler import blank_canvas as blank_canvas
from mdm_jax.samplers.sampler import make_generator as make_generator
from mdm_jax.samplers.sampler import sample as sample
from mdm_jax.samplers.sampler import sample_with_trace as sample_with_trace
