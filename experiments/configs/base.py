"""``mdm_jax.launch.config``, under its old path."""

from mdm_jax.launch.config import get_config as get_config
