"""Generated reasoning tasks: a prompt that is never masked, an answer that is, and a checker."""

from mdm_jax.data.tasks.add import Add as Add
from mdm_jax.data.tasks.chain import Chain as Chain
from mdm_jax.data.tasks.countdown import Countdown as Countdown
from mdm_jax.data.tasks.noisy import Noisy as Noisy
from mdm_jax.data.tasks.rows import TaskRows as TaskRows
from mdm_jax.data.tasks.rows import task_dataset as task_dataset
from mdm_jax.data.tasks.run import Run as Run
from mdm_jax.data.tasks.sudoku import Sudoku as Sudoku
from mdm_jax.data.tasks.task import VOCABULARY as VOCABULARY
from mdm_jax.data.tasks.task import Choices as Choices
from mdm_jax.data.tasks.task import Pair as Pair
from mdm_jax.data.tasks.task import Task as Task
from mdm_jax.data.tasks.task import example as example
from mdm_jax.data.tasks.task import split_of as split_of
