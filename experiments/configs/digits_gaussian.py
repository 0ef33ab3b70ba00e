"""``--config=digits_gaussian``, as a file."""

from mdm_jax.launch import presets

get_config = presets.digits_gaussian
