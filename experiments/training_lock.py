"""One trainer at a time in a working directory."""

import contextlib
import fcntl
import os
import pathlib
import platform
from collections.abc import Iterator

from experiments.workdir import WorkdirError
from mdm_jax import processes

FILE = "training.lock"


@contextlib.contextmanager
def training_lock(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps other trainers out of ``workdir``, which exists, until the block ends.

    It is a lock on a file that stays there; the system releases it when the process ends in any
    way. On a file system that has no locks there is none. With several processes the first one
    holds it.

    Raises:
        WorkdirError: in all processes, naming the trainer that is at work there.
    """
    with contextlib.ExitStack() as stack:
        other = None
        if processes.is_first():
            file = stack.enter_context((workdir / FILE).open("a+", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                other = file.read().strip() or "a process that did not say who it is"
            except OSError:
                pass  # some network file systems
            if other is None:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}\n")
                file.flush()
        other = processes.from_first(other)
        if other is not None:
            raise WorkdirError(
                f"{workdir} is being trained in already, by {other}; wait for it, stop it, or name "
                "another --workdir"
            )
        yield
