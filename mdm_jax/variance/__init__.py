"""Variance reduction by transforms of the draw that compose like optax transformations."""

from mdm_jax.variance.chain import chain as chain
from mdm_jax.variance.chain import identity as identity
from mdm_jax.variance.mirror import mirror as mirror
from mdm_jax.variance.stratified import stratified as stratified
from mdm_jax.variance.systematic import systematic as systematic
from mdm_jax.variance.transform import BIAS_LABELS as BIAS_LABELS
from mdm_jax.variance.transform import EmptyState as EmptyState
from mdm_jax.variance.transform import Phase as Phase
from mdm_jax.variance.transform import VarianceTransform as VarianceTransform
from mdm_jax.variance.transform import draw_batch as draw_batch
from mdm_jax.variance.transform import replicate_views as replicate_views
from mdm_jax.variance.transform import stateless as stateless
