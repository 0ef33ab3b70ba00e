"""``--config=text_block``, under its old path."""

from mdm_jax.launch.configs.text_block import get_config as get_config
