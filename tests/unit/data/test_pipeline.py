"""Order, resuming, processes, prefetching and evaluation batches."""

import contextlib
import gc
import json
import threading
import time

import jax
import numpy as np
import pytest

from mdm_jax import data
from mdm_jax.types import Batch

SEED = 5


class Numbered:
    """A user's source: row i is filled with i."""

    def __init__(self, size=20):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)
        return Batch(
            np.full(3, index, np.int32), np.ones(3, bool), np.ones(3, np.int32), np.int32(3)
        )


def numbers(batch):
    return batch.tokens[:, 0].tolist()


def take(iterator, count):
    return [numbers(next(iterator)) for _ in range(count)]


@contextlib.contextmanager
def stream(prefetch=2, place=None, source=None, **settings):
    iterator = data.train_iterator(
        source or Numbered(), 6, SEED, prefetch=prefetch, place=place, **settings
    )
    with contextlib.closing(iterator):
        yield iterator


@pytest.fixture(scope="module")
def expected():
    with stream(prefetch=0) as iterator:
        return take(iterator, 12)


def test_source_without_rows_is_a_row_source_and_can_be_gathered():
    assert isinstance(Numbered(), data.RowSource)
    batch = data.gather(Numbered(), [4, 0])
    assert numbers(batch) == [4, 0]
    assert batch.units.tolist() == [3, 3] and batch.eligible.shape == (2, 3)


def test_every_epoch_visits_each_row_once_in_its_own_order(expected):
    rows = sum(expected, [])
    epochs = [rows[i : i + 20] for i in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(20))


def test_order_is_that_of_earlier_releases(expected):
    """Checkpoints count batches, so the order of a seed may never change."""
    assert expected[:3] == [[12, 9, 14, 15, 18, 0], [6, 5, 17, 11, 4, 2], [3, 10, 13, 19, 8, 7]]


def test_order_is_a_function_of_the_seed():
    orders = {s: take(data.train_iterator(Numbered(), 8, s), 5) for s in (0, 1, 2**32 - 1)}
    assert take(data.train_iterator(Numbered(), 8, 1), 5) == orders[1]
    assert orders[0] != orders[1] != orders[2**32 - 1]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_prefetching_changes_nothing_and_resuming_is_exact(expected, prefetch):
    with stream(prefetch) as iterator:
        assert iterator.get_state() == {"next_index": 0}
        assert take(iterator, 4) == expected[:4]
        time.sleep(0.02)  # let it run ahead
        state = json.loads(json.dumps(iterator.get_state()))
        assert state == {"next_index": 4}  # as checkpoints of all releases hold it
        assert take(iterator, 4) == expected[4:8]
        iterator.set_state(state)
        assert iterator.get_state() == state
        assert take(iterator, 5) == expected[4:9]
    with stream(prefetch) as other:
        other.set_state(state)
        assert take(other, 8) == expected[4:]


def test_resuming_embedded_text_is_exact_to_the_bit():
    source = data.embedded_text(64).train
    with stream(source=source) as first, stream(source=source) as second:
        batches = [next(first) for _ in range(3)]
        second.set_state(first.get_state())
        batches = [next(first) for _ in range(3)]
        for batch in batches:
            jax.tree.map(np.testing.assert_array_equal, next(second), batch)


def test_rows_are_parts_of_the_global_batch(expected):
    for rows in ([0, 1, 2], [3, 4, 5], [5, 0]):
        with stream(rows=np.asarray(rows)) as iterator:
            assert take(iterator, 6) == [[b[i] for i in rows] for b in expected[:6]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 21}, "batch_size 21 is larger than the source, which has 20 rows"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
        ({"seed": -1}, "seed must be in"),
        ({"seed": 2**32}, "seed must be in"),
        ({"rows": [6]}, r"rows must be numbers in \[0, 6\)"),
        ({"rows": []}, r"rows must be numbers in \[0, 6\)"),
        ({"prefetch": -1}, "prefetch must not be negative"),
    ],
)
def test_bad_arguments_are_refused_when_the_iterator_is_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.train_iterator(Numbered(), **{"batch_size": 6, "seed": 0, **arguments})


# --- prefetching


class Counted(Numbered):
    """Counts how often a row is read, and fails at the reads of ``failing``, counted from 1."""

    def __init__(self, failing=()):
        super().__init__()
        self.reads, self.failing = 0, failing

    def rows(self, indices):
        self.reads += 1
        if self.reads in self.failing:
            raise OSError(f"disk failed at {self.reads}")
        return data.gather(Numbered(), indices)


def threads():
    return [t for t in threading.enumerate() if "prefetch" in t.name]


def test_batches_are_placed_on_the_one_thread_that_reads_ahead():
    names = []

    def place(batch):
        names.append(threading.current_thread().name)
        return jax.device_put(batch)

    with stream(place=place) as iterator:
        batch = next(iterator)
        assert isinstance(batch.tokens, jax.Array)
        assert len(set(names)) == 1 and threading.current_thread().name not in names
    assert not threads()


def test_no_more_is_read_ahead_than_was_asked_for():
    source = Counted()
    with stream(prefetch=3, source=source) as iterator:
        assert source.reads == 0  # nothing is read before the first request
        next(iterator)
        deadline = time.time() + 5
        while source.reads < 5 and time.time() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert source.reads == 5  # the one handed out, three ready, one being prepared
        assert iterator.get_state() == {"next_index": 1}
    assert not threads()


@pytest.mark.parametrize("prefetch", [0, 4])
def test_an_error_of_reading_is_raised_at_its_batch_and_the_batch_tried_again(expected, prefetch):
    with stream(prefetch, source=Counted(failing=(3, 4))) as iterator:
        assert take(iterator, 2) == expected[:2]
        for attempt in (3, 4):
            with pytest.raises(OSError, match=f"disk failed at {attempt}"):
                next(iterator)
            assert iterator.get_state() == {"next_index": 2} and not threads()
        assert take(iterator, 3) == expected[2:5]


def test_an_error_of_placing_is_raised(expected):
    def place(batch):
        raise RuntimeError("no room on the device")

    with stream(place=place) as iterator:
        with pytest.raises(RuntimeError, match="no room"):
            next(iterator)
        assert iterator.get_state() == {"next_index": 0}


def test_closing_ends_the_thread_and_so_does_forgetting():
    with stream() as iterator:
        next(iterator)
        assert len(threads()) == 1
        iterator.close()
        assert not threads()
        with pytest.raises(ValueError, match="closed"):
            next(iterator)

    iterator = data.train_iterator(Numbered(), 6, SEED, prefetch=2)
    next(iterator)
    del iterator
    gc.collect()
    assert not threads()


# --- evaluation and fingerprints


@pytest.mark.parametrize("batch_size", [1, 4, 5, 10, 16])
def test_evaluation_holds_every_row_once_and_keeps_the_shape(batch_size):
    batches = list(data.evaluation_batches(Numbered(10), batch_size))
    assert {b.tokens.shape for b in batches} == {(batch_size, 3)}
    assert len(batches) == -(-10 // batch_size)
    real = np.concatenate([b.eligible.any(axis=1) for b in batches])
    assert np.concatenate([b.tokens for b in batches])[real][:, 0].tolist() == list(range(10))
    assert real.tolist() == [True] * 10 + [False] * (len(real) - 10)
    for b in batches:
        empty = ~b.eligible.any(axis=1)
        assert not b.documents[empty].any() and not b.units[empty].any()
        assert [a.dtype for a in b] == [np.int32, bool, np.int32, np.int32]
    assert sum(b.units.sum() for b in batches) == 30


@pytest.mark.parametrize(
    ("max_rows", "rows"), [(5, [0, 2, 4, 6, 8]), (3, [0, 3, 6]), (99, list(range(10)))]
)
def test_evaluation_of_some_rows_spreads_them_over_the_source(max_rows, rows):
    batches = data.evaluation_batches(Numbered(10), 1, max_rows)
    assert sum(map(numbers, batches), []) == rows


def test_evaluation_refuses_bad_arguments_at_once():
    with pytest.raises(ValueError, match="no rows"):
        data.evaluation_batches(Numbered(0), 4)
    with pytest.raises(ValueError, match="max_rows must be a positive integer"):
        data.evaluation_batches(Numbered(4), 4, max_rows=0)
    with pytest.raises(ValueError, match="batch_size must be a positive integer"):
        data.evaluation_batches(Numbered(4), 0)


def test_changed_streams_are_refused_by_name(tmp_path):
    def dataset(content, tokenizer="char"):
        path = tmp_path / "t.txt"
        path.write_text(content)
        return data.text(path, 8, tokenizer=tokenizer)

    base = dataset("abc" * 99)
    saved = json.loads(json.dumps(data.stream_fingerprint(base, 16, 3)))
    data.check_same_stream(saved, data.stream_fingerprint(base, 16, 3))
    cases = {
        ("batch size",): data.stream_fingerprint(base, 17, 3),
        ("seed",): data.stream_fingerprint(base, 16, 4),
        ("data",): data.stream_fingerprint(dataset("abc" * 99 + "a"), 16, 3),
        ("data", "tokenizer"): data.stream_fingerprint(dataset("abc" * 99, "byte"), 16, 3),
        ("batch size", "seed"): data.stream_fingerprint(base, 8, 0),
    }
    for names, current in cases.items():
        with pytest.raises(ValueError, match="cannot be continued") as caught:
            data.check_same_stream(saved, current)
        listed = str(caught.value).split("these changed: ")[1].split("; ")
        assert tuple(item.split(":")[0] for item in listed) == names
    with pytest.raises(ValueError, match="seed: saved nothing, now 3"):
        data.check_same_stream({k: v for k, v in saved.items() if k != "seed"}, saved)
