"""``--config=mnist_gaussian``, under its old path."""

from mdm_jax.launch.configs.mnist_gaussian import get_config as get_config
