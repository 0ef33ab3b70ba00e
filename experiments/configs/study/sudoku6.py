"""6 x 6 Sudoku, the study's main task: minutes on two CPU cores, and the number of decoding steps
matters.

mdm train --config=experiments/configs/study/sudoku6.py --workdir=runs/sudoku6
"""

from experiments.configs.study import settings


def get_config(variant: str = ""):
    """Boxes of 2 x 3 with 12 to 20 blanks.

    ``variant`` is "", "hard" (20 to 26 blanks, to fine-tune on) or "smoke".
    """
    config = settings.reasoning("sudoku", batch_size=64, steps=700)
    config.model.depth = 4
    config.data.task.sudoku.update(rows=2, columns=3, blanks=(12, 20))
    if variant == "hard":
        settings.fine_tune(config)
        config.data.task.sudoku.blanks = (20, 26)
        return config
    return settings.chosen(config, "study/sudoku6", variant, "hard")
