"""``--config=mnist_gaussian``, as a file."""

from mdm_jax.launch import presets

get_config = presets.mnist_gaussian
