"""``--config=quickstart``, under its old path."""

from mdm_jax.launch.configs.quickstart import get_config as get_config
