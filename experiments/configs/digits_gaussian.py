"""``--config=digits_gaussian``, under its old path."""

from mdm_jax.launch.configs.digits_gaussian import get_config as get_config
