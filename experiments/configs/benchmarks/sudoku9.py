"""9 x 9 Sudoku, generated: 100,000 puzzles with 30 to 54 blanks and one solution each.

mdm train --config=experiments/configs/benchmarks/sudoku9.py --workdir=runs/sudoku9

8 blocks of width 256, 300 epochs of batches of 1,024 (as Ye et al. 2024 on 100,000 puzzles). A
published set in place of generated puzzles, by its file:
python -m experiments.prepare sudoku --source=PUZZLES.csv --to=data/sudoku.jsonl
mdm train --config=experiments/configs/benchmarks/sudoku9.py:file --workdir=runs/sudoku9_file

The variant "local" is the same network for a CPU hour.
"""

from experiments.published import settings

PUZZLES = 100_000


def get_config(variant: str = ""):
    """``variant`` is "", "file", "local" or "smoke"."""
    if variant == "local":
        return _local()
    batch_size = 1024
    config = settings.puzzles("sudoku", 300 * PUZZLES // batch_size, batch_size, peak=1e-3)
    _network_and_data(config)
    if variant == "file":
        return settings.from_file(config, "data/sudoku.jsonl")
    return settings.chosen(config, "benchmarks/sudoku9", variant, "file", "local")


def _network_and_data(config):
    config.data.task.sudoku.update(rows=3, columns=3, blanks=(30, 54))
    config.data.task.train_rows = PUZZLES
    config.model.update(width=256, depth=8, num_heads=8)


def _local():
    config = settings.reasoning("sudoku", batch_size=16, steps=1000)
    _network_and_data(config)
    config.train.update(evaluate_every=100, checkpoint_every=50)
    config.optimizer.update(peak=2e-2, warmup_steps=100, ema_decay=0.99)  # of the kept run
    config.evaluate.update(max_rows=64, passes=2)
    config.sample.num_answers = 32
    return config
