"""``--config=text_partition``, as a file."""

from mdm_jax.launch import presets

get_config = presets.text_partition
