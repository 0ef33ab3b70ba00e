"""Batches prepared and placed on devices while the previous step runs."""

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Self


class Prefetcher(Iterator[Any]):
    """Pulls batches of ``iterator`` ahead of time on one background thread.

    The state it reports is that of the batches it has handed *out*: what was pulled ahead is
    pulled again after a restore. While it is open, nobody else may use ``iterator``.

    Args:
        iterator: has ``__next__``, ``get_state`` and ``set_state``, such as a
            :func:`mdm_jax.data.train_iterator`.
        depth: batches to hold ready, at least 1.
        place: applied to each batch on the thread, for example a ``jax.device_put``.

    Raises:
        ValueError: if ``depth`` is not positive.

    An exception on the thread is raised by the ``next`` that would have returned the batch, and by
    every later one until :meth:`set_state`. Use it as a context manager, or call :meth:`close`.
    """

    def __init__(
        self,
        iterator: Any,
        depth: int = 2,
        place: Callable[[Any], Any] = lambda batch: batch,
    ):
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self._iterator = iterator
        self._depth = depth
        self._place = place
        self._state = iterator.get_state()
        self._worker: _Worker | None = None
        self._failure: BaseException | None = None
        self._closed = False

    def __next__(self) -> Any:
        if self._closed:
            raise ValueError("this Prefetcher is closed")
        if self._failure is not None:
            raise self._failure
        if self._worker is None:
            self._worker = _Worker(self._iterator, self._depth, self._place)
            # The thread does not refer to self, so dropping the Prefetcher ends it.
            self._finalizer = weakref.finalize(self, self._worker.stop)
        batch, state, failure = self._worker.get()
        if failure is not None:
            self._stop_worker()
            self._failure = failure
            raise failure
        self._state = state
        return batch

    def get_state(self) -> Any:
        """State right after the last batch handed out, as ``iterator.get_state()`` gives it."""
        return self._state

    def set_state(self, state: Any) -> None:
        """Continues as ``iterator`` would after ``iterator.set_state(state)``."""
        if self._closed:
            raise ValueError("this Prefetcher is closed")
        self._stop_worker()
        self._iterator.set_state(state)
        self._state = state
        self._failure = None

    def close(self) -> None:
        """Ends the thread and rewinds ``iterator`` to :meth:`get_state`; may be called twice."""
        if self._closed:
            return
        self._closed = True
        self._stop_worker()
        self._iterator.set_state(self._state)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _stop_worker(self) -> None:
        if self._worker is not None:
            self._finalizer.detach()
            self._worker.stop()
            self._worker = None


class _Worker:
    """One thread that fills a bounded queue with (batch, state after it, failure)."""

    def __init__(self, iterator: Any, depth: int, place: Callable[[Any], Any]):
        self._queue: queue.Queue = queue.Queue()
        self._room = threading.Semaphore(depth)
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=_fill,
            args=(iterator, place, self._queue, self._room, self._stopping),
            name="mdm_jax-prefetch",
            daemon=True,
        )
        self._thread.start()

    def get(self) -> tuple[Any, Any, BaseException | None]:
        item = self._queue.get()
        self._room.release()
        return item

    def stop(self) -> None:
        self._stopping.set()
        self._room.release()
        self._thread.join()


def _fill(iterator, place, ready, room, stopping) -> None:
    while True:
        room.acquire()
        if stopping.is_set():
            return
        try:
            batch = next(iterator)
            state = iterator.get_state()
            item = (place(batch), state, None)
        except BaseException as error:  # handed to the consumer, who raises it
            item = (None, None, error)
        ready.put(item)
        if item[2] is not None:
            return
