"""Fine-tuning a 6 x 6 Sudoku model on a few answers with random letters in them.

mdm train --config=experiments/configs/study/sudoku6_noisy.py \
    --config.train.init_from=runs/sudoku6 --workdir=runs/sudoku6_noisy

Without ``train.init_from`` the same task is trained from scratch.
"""

from experiments.configs.study import settings, sudoku6


def get_config(variant: str = ""):
    """A letter of ``wxyz`` after every three digits; ``variant`` is "" or "smoke"."""
    config = sudoku6.get_config()
    settings.fine_tune(config)
    config.data.task.noise_every = 3
    return settings.chosen(config, "study/sudoku6_noisy", variant)
