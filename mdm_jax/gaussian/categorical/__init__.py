"""Continuous diffusion of categorical data: token embeddings (CDCD), mixed tables (CDTD)."""

from mdm_jax.gaussian.categorical.embedding import (
    EmbeddingTransformer,
    NoisyTokens,
    embedding_apply,
    nearest_tokens,
    posterior_mean,
    unit_embeddings,
)
from mdm_jax.gaussian.categorical.likelihood import embedding_estimator, table_estimator
from mdm_jax.gaussian.categorical.mixed import (
    Cells,
    NoisyCells,
    TableTransformer,
    cdtd_loss,
    cell_losses,
    cells_of,
    table_apply,
)
from mdm_jax.gaussian.categorical.objective import cdcd_loss
from mdm_jax.gaussian.categorical.sampling import (
    ELEMENTWISE,
    make_embedding_generator,
    make_table_generator,
    self_conditioned,
)
