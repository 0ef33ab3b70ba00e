"""Generated tasks as tasks of lm-eval: their rows for ``evaluation.local_tasks``, their checker."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from mdm_jax.tasks import arithmetic, sudoku
from mdm_jax.tasks.task import Task, example

_TASKS = {
    each.__name__: each
    for each in (*(getattr(arithmetic, n) for n in ("Run", "Chain", "Add", "Countdown")),
                 sudoku.Sudoku)
}  # fmt: skip


def rows(task: Task, count: int, split: str = "test") -> Iterator[dict[str, Any]]:
    """Rows of kind ``checked`` of the first examples of a split; ValueError for a noisy task."""
    if type(task).__name__ not in _TASKS:
        raise ValueError(f"tasks that can be stored are {', '.join(_TASKS)}, got {task!r}")
    stored = {"name": type(task).__name__, **dataclasses.asdict(task)}
    for index in range(count):
        prompt, answer = example(task, split, index)
        yield {"question": prompt, "answer": answer, "task": stored}


def check(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """lm-eval's ``process_results``: whether a text is a right answer, not only the stored one."""
    settings = dict(doc["task"])
    task = _TASKS[settings.pop("name")](**settings)
    return {"exact_match": float(task.check(doc["question"], results[0]))}
