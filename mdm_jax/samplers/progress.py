"""Telling the host how far a compiled loop has come."""

from collections.abc import Callable

import jax

from mdm_jax.typing import Array

Progress = Callable[[int, int], None]
"""``progress(steps_done, num_steps)``, for display: called on the host after each step."""


def reporter(progress: Progress | None, num_steps: int) -> Callable[[Array], None]:
    """``report(steps_done)`` for a traced loop: calls ``progress`` on the host, if there is any."""
    if progress is None:
        return lambda steps_done: None  # noqa: ARG005

    def tell(steps_done: Array) -> None:
        progress(int(steps_done), num_steps)

    return lambda steps_done: jax.debug.callback(tell, steps_done)
