"""``--config=text_uniform``, under its old path."""

from mdm_jax.launch.configs.text_uniform import get_config as get_config
