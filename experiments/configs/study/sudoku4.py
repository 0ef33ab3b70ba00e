"""4 x 4 Sudoku: nearly solved in minutes on two CPU cores, the smoke test of the study.

mdm train --config=experiments/configs/study/sudoku4.py --workdir=runs/sudoku4
"""

from experiments.configs.study import settings


def get_config(variant: str = ""):
    """Boxes of 2 x 2 with 6 to 11 blanks; ``variant`` is "" or "smoke"."""
    config = settings.reasoning("sudoku", batch_size=64, steps=300)
    config.data.task.sudoku.update(rows=2, columns=2, blanks=(6, 11))
    return settings.chosen(config, "study/sudoku4", variant)
