"""9 x 9 Sudoku with few blanks, for a model that is small for two CPU cores.

mdm train --config=experiments/configs/study/sudoku9.py --workdir=runs/sudoku9
"""

from experiments.configs.study import settings


def get_config(variant: str = ""):
    """Boxes of 3 x 3 with 10 to 20 blanks; ``variant`` is "" or "smoke"."""
    config = settings.reasoning("sudoku", batch_size=16, steps=1200)
    config.model.update(width=128, depth=4)
    config.data.task.sudoku.update(rows=3, columns=3, blanks=(10, 20))
    return settings.chosen(config, "study/sudoku9", variant)
