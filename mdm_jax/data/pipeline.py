"""Batches in a reproducible order, for training (endless, resumable) and evaluation (once).

Batches prepared and placed on devices while the previous step runs.
"""

import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from mdm_jax.data.datasets import Dataset, RowSource, check_positive, gather
from mdm_jax.types import Batch

if TYPE_CHECKING:
    import grain


def train_iterator(
    source: RowSource,
    batch_size: int,
    seed: int,
    shard_index: int = 0,
    shard_count: int = 1,
    prefetch: int = 0,
    rows: np.ndarray | None = None,
) -> "grain.DatasetIterator":
    """Endless iterator over shuffled batches of ``source``.

    Each epoch visits every row once in its own order; a batch may hold the end of one epoch and the
    beginning of the next. Global batch i is a function of (rows, batch_size, seed, i) alone. A
    shard (one process of several) gets its contiguous part of every global batch, so joining the
    parts gives the same stream for any number of shards.

    The iterator's ``get_state()`` is a small JSON-able dict that counts batches;
    ``set_state(state)`` continues right after them. The state knows nothing of the data: keep
    :func:`stream_fingerprint` next to it.

    Args:
        source: training rows.
        batch_size: B, rows of the *global* batch, over all shards.
        seed: of the order, in [0, 2**32).
        shard_index: which part of each batch to return.
        shard_count: number of parts; must divide ``batch_size``.
        prefetch: batches to read ahead on a thread of Grain's. Leave 0 inside a
            :class:`mdm_jax.data.Prefetcher`, which has its own.
        rows: numbers of the rows of each global batch to return, in place of a contiguous shard,
            such as ``training.local_rows``.

    Returns:
        Iterator of Batch with a leading axis of ``batch_size // shard_count``, or as long as
        ``rows``; NumPy arrays.

    Raises:
        ValueError: if the source has fewer rows than a batch, or an argument is out of range.
    """
    local = _local_rows(batch_size, shard_index, shard_count)
    if rows is not None:
        local = _chosen_rows(rows, batch_size, shard_count)
    if len(source) < batch_size:
        raise ValueError(
            f"batch_size {batch_size} is larger than the source, which has {len(source)} rows; "
            "choose a smaller batch or, for text, a smaller train_stride"
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    if prefetch < 0:
        raise ValueError(f"prefetch must not be negative, got {prefetch}")
    import grain

    # Indices, not rows, go through Grain: rows are then read a batch at a time.
    order = grain.MapDataset.range(len(source)).seed(int(seed)).shuffle().repeat(None)
    batches = order.batch(int(batch_size), drop_remainder=True).map(
        lambda indices: gather(source, indices[local])
    )
    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    return iter(batches.to_iter_dataset(options))


def evaluation_batches(
    source: RowSource,
    batch_size: int,
    max_rows: int | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
) -> Iterator[Batch]:
    """Batches that hold every row of ``source`` exactly once, in order.

    All have the same shape: the last is filled up with empty rows, on which nothing is eligible,
    documents are 0 and units are 0.

    Args:
        source: rows.
        batch_size: B, rows of the global batch.
        max_rows: take only so many rows, evenly spaced over the source; None for all.
        shard_index: which contiguous part of each batch to return.
        shard_count: number of parts; must divide ``batch_size``.

    Returns:
        Iterator of Batch with a leading axis of ``batch_size // shard_count``, NumPy arrays.

    Raises:
        ValueError: if the source is empty or an argument is out of range.
    """
    local = _local_rows(batch_size, shard_index, shard_count)
    size = len(source)
    if not size:
        raise ValueError("there is nothing to evaluate: the source has no rows")
    if max_rows is not None:
        check_positive("max_rows", max_rows)
    count = size if max_rows is None else min(max_rows, size)
    chosen = np.arange(count, dtype=np.int64) * size // count

    def batches() -> Iterator[Batch]:
        for start in range(0, count, batch_size):
            yield _filled(source, chosen[start : start + batch_size][local], local)

    return batches()


def stream_fingerprint(dataset: Dataset, batch_size: int, seed: int) -> dict[str, Any]:
    """What determines the training stream, JSON-able, to be stored beside an iterator's state."""
    return {
        "batch_size": int(batch_size),
        "seed": int(seed),
        "data": dataset.fingerprint,
        "tokenizer": None if dataset.tokenizer is None else dataset.tokenizer.fingerprint,
    }


def check_same_stream(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuses to continue a stream with settings that would silently make it another one.

    Args:
        saved: :func:`stream_fingerprint` of the run that wrote the checkpoint.
        current: that of the run that wants to continue.

    Raises:
        ValueError: listing each of batch size, seed, data and tokenizer that differs.
    """
    changed = [
        f"{key.replace('_', ' ')}: saved {saved.get(key, 'nothing')}, now "
        f"{current.get(key, 'nothing')}"
        for key in sorted({*saved, *current})
        if saved.get(key) != current.get(key) or (key in saved) != (key in current)
    ]
    if changed:
        raise ValueError(
            "the checkpoint's data stream cannot be continued, since these changed: "
            + "; ".join(changed)
            + ". Restore the old settings, or start a new run"
        )


def _local_rows(batch_size: int, shard_index: int, shard_count: int) -> slice:
    check_positive("batch_size", batch_size)
    check_positive("shard_count", shard_count)
    if not 0 <= shard_index < shard_count:
        raise ValueError(f"shard_index must be in [0, {shard_count}), got {shard_index}")
    if batch_size % shard_count:
        raise ValueError(f"batch_size {batch_size} is not a multiple of shard_count {shard_count}")
    share = batch_size // shard_count
    return slice(shard_index * share, (shard_index + 1) * share)


def _chosen_rows(rows: np.ndarray, batch_size: int, shard_count: int) -> np.ndarray:
    chosen = np.asarray(rows)
    if shard_count != 1:
        raise ValueError("give rows or shards, not both")
    if chosen.ndim != 1 or not chosen.size or chosen.min() < 0 or chosen.max() >= batch_size:
        raise ValueError(f"rows must be numbers in [0, {batch_size}), got {rows}")
    return chosen


def _filled(source: RowSource, indices: np.ndarray, local: slice) -> Batch:
    size = local.stop - local.start
    # A shard may have no row of the last batch; row 0 then only lends its shape.
    found = gather(source, indices if len(indices) else [0])
    missing = size - len(indices)
    if not missing:
        return found
    return Batch(
        *(
            np.concatenate(
                [field[: len(indices)], np.zeros((missing, *field.shape[1:]), field.dtype)]
            )
            for field in map(np.asarray, found)
        )
    )


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
