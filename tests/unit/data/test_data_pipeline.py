"""Order, resume, shards, evaluation batches and the background thread."""

import gc
import json
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from mdm_jax import data
from mdm_jax.types import Batch


class Numbered:
    """A user's source: row i is filled with i."""

    def __init__(self, size):
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


def test_source_without_rows_is_a_row_source_and_can_be_gathered():
    assert isinstance(Numbered(3), data.RowSource)
    batch = data.gather(Numbered(5), [4, 0])
    assert numbers(batch) == [4, 0]
    assert batch.units.tolist() == [3, 3] and batch.eligible.shape == (2, 3)


def test_every_epoch_visits_each_row_once_in_its_own_order():
    stream = sum(take(data.train_iterator(Numbered(20), 6, seed=0), 10), [])
    epochs = [stream[i : i + 20] for i in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(20))


def test_order_is_a_function_of_the_seed():
    streams = {s: take(data.train_iterator(Numbered(50), 8, seed=s), 5) for s in (0, 1, 2**32 - 1)}
    assert take(data.train_iterator(Numbered(50), 8, seed=1), 5) == streams[1]
    assert streams[0] != streams[1] != streams[2**32 - 1]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_read_ahead_changes_nothing_and_resume_is_exact(prefetch):
    want = take(data.train_iterator(Numbered(20), 6, seed=5), 9)
    iterator = data.train_iterator(Numbered(20), 6, seed=5, prefetch=prefetch)
    assert take(iterator, 4) == want[:4]
    state = json.loads(json.dumps(iterator.get_state()))
    assert take(iterator, 5) == want[4:]
    other = data.train_iterator(Numbered(20), 6, seed=5, prefetch=prefetch)
    other.set_state(state)
    assert take(other, 5) == want[4:]
    iterator.set_state(state)  # backwards, on one that has run
    assert take(iterator, 5) == want[4:]


def test_shards_are_the_parts_of_the_global_batch():
    size, batch = 24, 8
    whole = take(data.train_iterator(Numbered(size), batch, seed=3), 6)
    for count in (2, 4):
        shards = [
            take(data.train_iterator(Numbered(size), batch, 3, i, count), 6) for i in range(count)
        ]
        assert [sum(parts, []) for parts in zip(*shards)] == whole
        epoch = [set(sum(shard[:3], [])) for shard in shards]
        assert sum(map(len, epoch)) == size == len(set.union(*epoch))  # disjoint and covering


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 21}, "batch_size 21 is larger than the source, which has 20 rows"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
        ({"seed": -1}, "seed must be in"),
        ({"seed": 2**32}, "seed must be in"),
        ({"shard_index": 2, "shard_count": 2}, r"shard_index must be in \[0, 2\)"),
        ({"shard_count": 4}, "batch_size 6 is not a multiple of shard_count 4"),
        ({"shard_count": 0}, "shard_count must be a positive integer"),
        ({"prefetch": -1}, "prefetch must not be negative"),
    ],
)
def test_bad_arguments_are_refused_when_the_iterator_is_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.train_iterator(Numbered(20), **{"batch_size": 6, "seed": 0, **arguments})


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


def test_evaluation_of_some_rows_spreads_them_over_the_source():
    def found(**settings):
        return sum(map(numbers, data.evaluation_batches(Numbered(10), 1, **settings)), [])

    assert found(max_rows=5) == [0, 2, 4, 6, 8]
    assert found(max_rows=3) == [0, 3, 6]
    assert found(max_rows=99) == list(range(10))


def test_evaluation_shards_join_to_the_whole_with_equally_many_batches():
    whole = list(data.evaluation_batches(Numbered(9), 4))
    shards = [
        list(data.evaluation_batches(Numbered(9), 4, shard_index=i, shard_count=2))
        for i in range(2)
    ]
    assert len(shards[0]) == len(shards[1]) == len(whole) == 3
    for batch, *parts in zip(whole, *shards):
        for field, *pieces in zip(batch, *parts):
            np.testing.assert_array_equal(field, np.concatenate(pieces))


def test_evaluation_refuses_bad_arguments_at_once():
    with pytest.raises(ValueError, match="no rows"):
        data.evaluation_batches(Numbered(0), 4)
    with pytest.raises(ValueError, match="max_rows must be a positive integer"):
        data.evaluation_batches(Numbered(4), 4, max_rows=0)
    with pytest.raises(ValueError, match="multiple"):
        data.evaluation_batches(Numbered(4), 3, shard_count=2)


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


def prefetcher(depth=3, place=lambda batch: batch, **settings):
    return data.Prefetcher(data.train_iterator(Numbered(20), 6, 5, **settings), depth, place)


def test_prefetcher_gives_the_same_stream_and_resumes_after_what_it_handed_out():
    want = take(data.train_iterator(Numbered(20), 6, seed=5), 12)
    with prefetcher() as stream:
        assert stream.get_state() == {"next_index": 0}
        assert take(stream, 4) == want[:4]
        time.sleep(0.05)  # let it run ahead
        state = json.loads(json.dumps(stream.get_state()))
        assert take(stream, 4) == want[4:8]
        stream.set_state(state)
        assert stream.get_state() == state
        assert take(stream, 5) == want[4:9]
    with prefetcher(depth=1) as other:
        other.set_state(state)
        assert take(other, 8) == want[4:]


def test_prefetcher_resumes_embedded_text_bit_exactly():
    dataset = data.embedded_text(64)

    def stream():
        return data.Prefetcher(data.train_iterator(dataset.train, 8, seed=1))

    with stream() as uninterrupted:
        batches = [next(uninterrupted) for _ in range(6)]
    with stream() as first:
        for _ in range(3):
            next(first)
        state = first.get_state()
    with stream() as second:
        second.set_state(state)
        for want in batches[3:]:
            for a, b in zip(want, next(second)):
                np.testing.assert_array_equal(a, b)


def test_prefetcher_places_batches_on_its_thread():
    names = []

    def place(batch):
        names.append(threading.current_thread().name)
        return jax.device_put(batch)

    with prefetcher(place=place) as stream:
        batch = next(stream)
    assert isinstance(batch.tokens, jax.Array)
    assert set(names) == {"mdm_jax-prefetch"}


class Counting:
    """Counts up; records how far it was read."""

    def __init__(self, stop=10**9, fail_at=None):
        self.i, self.stop, self.fail_at = 0, stop, fail_at

    def __next__(self):
        if self.i == self.fail_at:
            raise OSError(f"disk failed at {self.i}")
        if self.i == self.stop:
            raise StopIteration
        self.i += 1
        return self.i - 1

    def get_state(self):
        return {"i": self.i}

    def set_state(self, state):
        self.i = state["i"]


def alive():
    return [t for t in threading.enumerate() if t.name == "mdm_jax-prefetch"]


def test_prefetcher_reads_depth_batches_ahead_and_no_more():
    source = Counting()
    with data.Prefetcher(source, depth=3) as stream:
        assert source.i == 0  # nothing is read before the first request
        assert next(stream) == 0
        deadline = time.time() + 5
        while source.i < 4 and time.time() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert source.i == 4
        assert stream.get_state() == {"i": 1}
    assert source.get_state() == {"i": 1}  # rewound to what was handed out
    assert not alive()


def test_prefetcher_raises_what_happened_on_the_thread_at_its_place():
    stream = data.Prefetcher(Counting(fail_at=2), depth=4)
    assert [next(stream), next(stream)] == [0, 1]
    for _ in range(2):
        with pytest.raises(OSError, match="disk failed at 2"):
            next(stream)
    assert stream.get_state() == {"i": 2}
    assert not alive()
    stream.set_state({"i": 1})
    assert next(stream) == 1
    with pytest.raises(OSError, match="disk failed"):
        next(stream)
    stream.close()


def test_prefetcher_raises_errors_of_place():
    def place(batch):
        raise RuntimeError("no room on the device")

    with data.Prefetcher(Counting(), place=place) as stream:
        with pytest.raises(RuntimeError, match="no room"):
            next(stream)
        assert stream.get_state() == {"i": 0}


def test_prefetcher_ends_where_its_iterator_ends():
    with data.Prefetcher(Counting(stop=3)) as stream:
        assert list(stream) == [0, 1, 2]
        assert stream.get_state() == {"i": 3}


def test_prefetcher_closes_cleanly_also_when_forgotten():
    stream = data.Prefetcher(Counting(), depth=2)
    next(stream)
    assert len(alive()) == 1
    stream.close()
    stream.close()
    assert not alive()
    with pytest.raises(ValueError, match="closed"):
        next(stream)
    with pytest.raises(ValueError, match="closed"):
        stream.set_state({"i": 0})

    stream = data.Prefetcher(Counting(), depth=2)
    next(stream)
    del stream
    gc.collect()
    assert not alive()
    with pytest.raises(ValueError, match="depth must be at least 1"):
        data.Prefetcher(Counting(), depth=0)


def test_importing_loads_no_heavy_library_and_a_prefetching_process_exits_without_noise():
    heavy = ["grain", "tokenizers", "sklearn", "tensorflow_datasets", "tensorflow"]
    heavy += ["scipy.stats", "scipy.optimize"]
    code = (
        "import sys\n"
        "from mdm_jax import data, evaluation, variance\n"
        f"print([m for m in {heavy} if m in sys.modules])\n"
        "stream = data.Prefetcher(data.train_iterator(data.embedded_text(32).train, 8, 0))\n"
        "print(next(stream).tokens.shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines() == ["[]", "(8, 32)"]
    assert "Traceback" not in done.stderr
