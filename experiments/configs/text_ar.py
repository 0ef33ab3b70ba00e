"""``--config=text_ar``, under its old path."""

from mdm_jax.launch.configs.text_ar import get_config as get_config
