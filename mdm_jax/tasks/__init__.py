"""Generated reasoning tasks: a prompt that is never masked, an answer that is, and a checker."""

from mdm_jax.tasks.arithmetic import Add, Chain, Countdown, CountdownDivision, Noisy, Run
from mdm_jax.tasks.sudoku import Sudoku
from mdm_jax.tasks.task import (
    VOCABULARY,
    Choices,
    Pair,
    Task,
    TaskRows,
    example,
    split_of,
    task_dataset,
    task_file_dataset,
)
from mdm_jax.tasks.zebra import Zebra
