"""``--config=digits_masked``, as a file."""

from mdm_jax.launch import presets

get_config = presets.digits_masked
