"""The defaults of ``mdm_jax.launch.config``, as a file."""

from mdm_jax.launch import config

get_config = config.get_config
