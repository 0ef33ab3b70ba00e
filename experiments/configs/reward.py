"""``--config=reward``, as a file."""

from mdm_jax.launch import presets

get_config = presets.reward
