"""``--config=digits_masked``, under its old path."""

from mdm_jax.launch.configs.digits_masked import get_config as get_config
