"""``--config=preference``, as a file."""

from mdm_jax.launch import presets

get_config = presets.preference
