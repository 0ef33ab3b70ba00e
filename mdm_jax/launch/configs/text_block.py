"""Block diffusion (BD3-LM) on the text that CPython carries.

python -m experiments.launch --config=experiments/configs/text_block.py:16 --workdir=runs/text_block
"""

from mdm_jax.launch import config as launch_config

SIZES = ("1", "4", "16")


def get_config(variant: str = "16"):
    """The quickstart's network, data and steps in blocks.

    ``variant`` is a block size (1, 4 or 16), "L" for one block a row, or "smoke".
    """
    config = launch_config.get_config()
    config.process = "block"
    if variant == "smoke":
        launch_config.shrink(config)
        config.data.update(length=32, train_stride=16)
        config.block.size = 8
        config.sample.update(num_samples=2, gap=8)
    elif variant == "L":
        config.block.size = config.data.length
    elif variant in SIZES:
        config.block.size = int(variant)
    else:
        raise ValueError(
            f"text_block has the variants {', '.join(SIZES)}, L and smoke; not {variant!r}"
        )
    return config
