"""Tables of numeric and categorical columns, as rows of integer codes."""

from mdm_jax.data.tables.column import NUM_VALUES, Column, as_csv, decoded
from mdm_jax.data.tables.sources import diabetes, table, table_dataset
