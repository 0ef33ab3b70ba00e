"""Training batches (endless, shuffled, resumable, prefetched) and evaluation batches (one pass)."""

import atexit
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mdm_jax.data.datasets import Dataset, check_positive
from mdm_jax.data.rows import Buckets, RowSource, example_keys, gather, parts_of
from mdm_jax.types import Batch, KeyedBatch

if TYPE_CHECKING:
    import grain

_OPEN: "weakref.WeakSet[grain.DatasetIterator]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Stop prefetch threads before the JAX backend shuts down."""
    for stream in list(_OPEN):
        stream.close()
        stream.close = lambda: None  # Grain's __del__ closes again, when its modules are gone


def train_iterator(
    source: RowSource,
    batch_size: int,
    seed: int,
    *,
    prefetch: int = 0,
    rows: np.ndarray | None = None,
    place: Callable[[Batch], Any] | None = None,
    by_example: bool = False,
    buckets: Buckets | None = None,
) -> "grain.DatasetIterator":
    """Endless iterator over shuffled batches of ``source``, resumable and prefetched by Grain.

    Each epoch visits every row once in its own order; a batch may span two epochs. Global batch i
    is a function of (source, batch_size, seed, i) alone. The parts of a
    :class:`~mdm_jax.data.rows.Mixture` have epochs and orders of their own, which other parts do
    not change, and their shares in any stretch of rows, to within a row. ValueError for an argument
    out of range.

    With ``buckets`` (:func:`~mdm_jax.data.rows.bucketed`, of this source and batch size) a batch
    has rows of one bucket and its length. Buckets have epochs of their own, and their shares in any
    stretch of batches, to within a batch, so that every row comes equally often in the long run.

    ``get_state()`` counts the batches handed out, not those prefetched: a small JSON-able dict for
    ``set_state(state)``. Keep :func:`stream_fingerprint`, which identifies the data, next to it. If
    reading or placing a batch fails, its ``next`` raises and the following one tries again.
    ``close()`` ends the thread.

    Args:
        batch_size: B, rows of the *global* batch, over all processes; at most those of ``source``.
        seed: of the order, in [0, 2**32).
        prefetch: batches held ready by a background thread, which prepares one more; 0: none.
        rows: which rows of each global batch to return, such as ``sharding.local_rows``; None: all.
        place: applied to each batch of NumPy arrays by its thread, for example ``jax.device_put``.
        by_example: return each as a ``KeyedBatch``, whose noise goes with the examples.
        buckets: rows by length; None: all batches have that of the source.
    """
    check_positive("batch_size", batch_size)
    local = np.arange(batch_size) if rows is None else np.asarray(rows)
    if local.ndim != 1 or not local.size or local.min() < 0 or local.max() >= batch_size:
        raise ValueError(f"rows must be numbers in [0, {batch_size}), got {rows}")
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
    from grain.experimental import ThreadPrefetchIterDataset

    parts, weights = parts_of(source)

    def read(visits: np.ndarray, bucket: int | None = None) -> Any:
        batch = _read(parts, visits[local], seed, by_example)
        batch = batch if bucket is None else buckets.cut(batch, bucket)
        return batch if place is None else place(batch)

    def order(number: int, chosen: np.ndarray | None = None) -> "grain.MapDataset":
        size = len(parts[number]) if chosen is None else len(chosen)
        rows = grain.MapDataset.range(size).seed(part_seed(seed, number)).shuffle().repeat(None)
        if chosen is not None:
            rows = rows.map(lambda row: chosen[row])
        return rows.map_with_index(lambda i, row: np.array([number, i // size, row]))

    def mixed(streams: "Sequence[grain.MapDataset]", shares: Sequence[float]) -> Any:
        return streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, shares)

    def batched(orders: "Sequence[grain.MapDataset]", shares: Sequence[float]) -> Any:
        return mixed(orders, shares).batch(int(batch_size), drop_remainder=True)

    # Visits, not rows, go through Grain: rows are then read a batch at a time.
    if buckets is None:
        batches = batched([order(number) for number in range(len(parts))], weights).map(read)
    else:
        streams = []
        for number, (rows_of, shares) in enumerate(zip(buckets.rows, buckets.shares)):
            some = [i for i, each in enumerate(rows_of) if len(each)]
            stream = batched([order(i, rows_of[i]) for i in some], [shares[i] for i in some])
            streams.append(stream.map(functools.partial(read, bucket=number)))
        batches = mixed(streams, [sum(shares) for shares in buckets.shares])
    sequential = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    stream = iter(
        ThreadPrefetchIterDataset(
            batches.to_iter_dataset(sequential), prefetch_buffer_size=prefetch
        )
    )
    _OPEN.add(stream)
    return stream


def sample_rows(source: RowSource, count: int, generator: np.random.Generator) -> Batch:
    """``count`` rows, independent, as a training stream draws them: the parts of a
    :class:`~mdm_jax.data.rows.Mixture` by its weights, rows that are cut at random cut."""
    (parts, weights), part = parts_of(source), np.zeros(count, np.int64)
    if len(parts) > 1:
        part = generator.choice(len(parts), count, p=weights)
    row = generator.integers(0, np.array([len(each) for each in parts])[part])
    cut = any(hasattr(each, "visit") for each in parts)
    seed = int(generator.integers(2**32)) if cut else 0
    # A visit each, so that a row that is drawn twice is cut twice.
    return _read(parts, np.stack([part, np.arange(count), row], axis=1), seed, by_example=False)


def part_seed(seed: int, part: int) -> int:
    """The seed of a part's order, that of the whole for the first."""
    return int(np.random.SeedSequence((seed, part)).generate_state(1)[0]) if part else int(seed)


def _read(
    parts: Sequence[RowSource], visits: np.ndarray, seed: int, by_example: bool
) -> Batch | KeyedBatch:
    """Rows of ``visits`` [n, 3]: part, visits of the row before this one, and row."""
    found, places = [], []
    for number in np.unique(visits[:, 0]):
        places.append(np.flatnonzero(visits[:, 0] == number))
        part, (_, before, rows) = parts[number], visits[places[-1]].T
        if hasattr(part, "visit"):
            batch = part.visit(rows, before, (int(seed), int(number)))
        else:
            batch = gather(part, rows)
        if by_example:
            keys = example_keys(part, rows, before, int(number), batch.tokens.shape[1])
            batch = KeyedBatch(*batch, keys)
        found.append(batch)
    if len(found) == 1:
        return found[0]
    back = np.argsort(np.concatenate(places))
    return type(found[0])(*(np.concatenate(field)[back] for field in zip(*found)))


def evaluation_batches(
    source: RowSource,
    batch_size: int,
    max_rows: int | None = None,
    read: Callable[[RowSource, np.ndarray], Batch] = gather,
) -> Iterator[Batch]:
    """Batches of ``batch_size`` that hold every row of ``source`` exactly once, in order.

    Empty rows fill up the last: nothing eligible, documents and units 0. ``max_rows`` takes so
    many, evenly spaced. ``read``: :func:`gather_together`, where all processes take all batches.
    ValueError if the source is empty or an argument is not positive.
    """
    check_positive("batch_size", batch_size)
    size = len(source)
    if not size:
        raise ValueError("there is nothing to evaluate: the source has no rows")
    if max_rows is not None:
        check_positive("max_rows", max_rows)
    count = size if max_rows is None else min(max_rows, size)
    selected = np.arange(count, dtype=np.int64) * size // count
    return (
        _filled(read(source, selected[start : start + batch_size]), batch_size)
        for start in range(0, count, batch_size)
    )


def stream_fingerprint(dataset: Dataset, batch_size: int, seed: int) -> dict[str, Any]:
    """The settings that determine a training stream, JSON-able, to store with its state."""
    return {
        "batch_size": int(batch_size),
        "seed": int(seed),
        "data": dataset.fingerprint,
        "tokenizer": None if dataset.tokenizer is None else dataset.tokenizer.fingerprint,
    }


def check_same_stream(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise ValueError, listing what differs, unless two :func:`stream_fingerprint` are equal."""
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


def _filled(batch: Batch, size: int) -> Batch:
    missing = (0, size - len(batch.tokens))
    return Batch(*(np.pad(field, [missing] + [(0, 0)] * (np.ndim(field) - 1)) for field in batch))
