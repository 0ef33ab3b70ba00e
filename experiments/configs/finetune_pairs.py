"""``--config=finetune_pairs``, as a file."""

from mdm_jax.launch import presets

get_config = presets.finetune_pairs
