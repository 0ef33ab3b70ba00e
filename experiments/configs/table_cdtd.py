"""``--config=table_cdtd``, as a file."""

from mdm_jax.launch import presets

get_config = presets.table_cdtd
