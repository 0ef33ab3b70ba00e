"""Row sources: spans of a token array, stored rows, pictures, mixtures; rows by length."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from mdm_jax import distributed
from mdm_jax.types import Batch


@runtime_checkable
class RowSource(Protocol):
    """Random access to rows; optional ``rows(indices [n]) -> Batch`` reads n at once, stacked."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch:
        """One row: NumPy fields [L], [L], [L] and [] of :class:`mdm_jax.types.Batch`."""
        ...


def gather(source: RowSource, indices: Sequence[int] | np.ndarray) -> Batch:
    """Stack rows ``indices`` [n] of ``source`` into one batch of n."""
    if hasattr(source, "rows"):
        return source.rows(np.asarray(indices, np.int64))
    rows = [source[int(i)] for i in indices]
    return Batch(*(np.stack(field) for field in zip(*rows)))


def gather_together(source: RowSource, indices: Sequence[int] | np.ndarray) -> Batch:
    """:func:`gather`, each process reading a part of the rows; all call it at the same point."""
    indices = np.asarray(indices, np.int64)
    return distributed.rows_of_all(lambda own: gather(source, indices[own]), len(indices))


class VectorisedRows(abc.ABC):
    """Base of row sources that read many rows at once."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abc.abstractmethod
    def _read(self, indices: np.ndarray) -> Batch:
        """Rows ``indices`` [n], which are in range, stacked."""

    def rows(self, indices: np.ndarray) -> Batch:
        """Rows ``indices`` [n] as a batch of n; IndexError outside [0, len)."""
        # Negative indices would wrap around in NumPy and hide a mistake.
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(
                f"row indices must be in [0, {len(self)}), got {indices.min()} to {indices.max()}"
            )
        return self._read(indices)

    def __getitem__(self, index: int) -> Batch:
        return Batch(*(field[0] for field in self.rows(np.asarray([index], np.int64))))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} rows)"


class TokenSpans(VectorisedRows):
    """Rows of ``length`` consecutive tokens of one array, padded after its end.

    ``tokens`` [n] int32, first one of each row in ``starts``. Padding is not eligible and of
    document 0. A row's ``units`` are the sum of ``character_counts`` [K].
    """

    def __init__(
        self,
        tokens: np.ndarray,
        starts: range,
        length: int,
        pad_id: int,
        character_counts: np.ndarray,
    ):
        self.tokens, self.length, self._starts = tokens, length, starts
        self._pad_id, self._character_counts = pad_id, character_counts

    def __len__(self) -> int:
        return len(self._starts)

    def _read(self, indices: np.ndarray) -> Batch:
        starts = self._starts.start + self._starts.step * indices
        positions = starts[:, None] + np.arange(self.length)
        inside = positions < len(self.tokens)
        tokens = self.tokens[np.minimum(positions, len(self.tokens) - 1)]
        tokens = np.where(inside, tokens, np.int32(self._pad_id)).astype(np.int32)
        return _text_rows(tokens, inside.astype(np.int32), self._character_counts)


class PackedSpans(VectorisedRows):
    """Rows of several spans of one token array each, padded after them.

    A row's spans are its documents 1, 2, ... in order, each beginning at a multiple of ``align``.
    ``starts``, ``ends``, ``rows`` [P]: first token, one past the last, and row (numbered without
    gaps) of each span; at most ``length`` positions a row. Padding and ``units`` as in
    :class:`TokenSpans`; with ``eos_id``, for rows of one span, it is EOS, eligible and of
    document 1. ``eligible`` [n] bool says which tokens are, None: all. ``offsets`` [P] are the
    columns at which the spans begin, row by row.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        starts: np.ndarray,
        ends: np.ndarray,
        rows: np.ndarray,
        length: int,
        pad_id: int,
        character_counts: np.ndarray,
        *,
        align: int = 1,
        eos_id: int | None = None,
        eligible: np.ndarray | None = None,
    ):
        order = np.argsort(rows, kind="stable")
        self.tokens, self.length, self.num_examples = tokens, length, len(starts)
        self._starts, self._ends, self._numbers = starts[order], ends[order], order
        self.eligible = eligible
        self._num_rows = int(rows.max()) + 1 if len(rows) else 0
        self._first = np.searchsorted(rows[order], np.arange(self._num_rows + 1))
        before = np.cumsum(np.append(0, aligned(self._ends - self._starts, align)))[:-1]
        self.offsets = before - before[self._first[rows[order]]]
        self._pad_id, self._character_counts, self._eos_id = pad_id, character_counts, eos_id

    def __len__(self) -> int:
        return self._num_rows

    def _read(self, indices: np.ndarray) -> Batch:
        tokens = np.full((len(indices), self.length), self._pad_id, np.int32)
        documents, eligible = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
        for i, row in enumerate(indices):
            spans = slice(self._first[row], self._first[row + 1])
            pieces = zip(self._starts[spans], self._ends[spans], self.offsets[spans])
            for number, (start, end, offset) in enumerate(pieces, 1):
                positions = slice(offset, offset + end - start)
                tokens[i, positions] = self.tokens[start:end]
                documents[i, positions] = number
                known = self.eligible is not None
                eligible[i, positions] = self.eligible[start:end] if known else True
        if self._eos_id is not None:
            rest = documents == 0
            tokens[rest], documents[rest], eligible[rest] = self._eos_id, 1, True
        return _text_rows(tokens, documents, self._character_counts, eligible)

    def examples(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of the span, in the order given, and position in it, of each token, [n, L]."""
        columns = np.arange(self.length)
        numbers, positions = (np.zeros((len(indices), self.length), np.int64) for _ in range(2))
        for i, row in enumerate(indices):
            spans = slice(self._first[row], self._first[row + 1])
            begun = np.searchsorted(self.offsets[spans], columns, side="right") - 1
            numbers[i] = self._numbers[spans][begun]
            positions[i] = columns - self.offsets[spans][begun]
        return numbers, positions


def _text_rows(
    tokens: np.ndarray,
    documents: np.ndarray,
    character_counts: np.ndarray,
    eligible: np.ndarray | None = None,
) -> Batch:
    eligible = documents > 0 if eligible is None else eligible
    units = (character_counts[tokens] * eligible).sum(axis=1, dtype=np.int32)
    return Batch(tokens, eligible, documents, units)


def aligned(sizes: np.ndarray, align: int) -> np.ndarray:
    """``sizes`` rounded up to multiples of ``align``."""
    return -(-sizes // align) * align


class StoredRows(VectorisedRows):
    """Rows of a Batch with a leading axis of all rows."""

    def __init__(self, batch: Batch):
        self._batch = batch

    def __len__(self) -> int:
        return len(self._batch.tokens)

    def _read(self, indices: np.ndarray) -> Batch:
        return Batch(*(field[indices] for field in self._batch))


class PictureRows(VectorisedRows):
    """Flattened pictures, all of whose elements are eligible.

    ``levels`` [rows, L] uint8, ``classes`` [rows] from 0; None where they are not known.
    """

    def __init__(self, levels: np.ndarray, classes: np.ndarray | None = None):
        self.levels, self.classes = levels, classes

    def __len__(self) -> int:
        return len(self.levels)

    def _read(self, indices: np.ndarray) -> Batch:
        tokens = self.levels[indices].astype(np.int32)
        number = np.ones(len(tokens)) if self.classes is None else 2 + self.classes[indices]
        return Batch(
            tokens=tokens,
            eligible=np.ones(tokens.shape, bool),
            documents=np.repeat(number.astype(np.int32)[:, None], tokens.shape[1], axis=1),
            units=np.full(len(tokens), tokens.shape[1], np.int32),
        )


class Mixture(VectorisedRows):
    """Rows of several sources, one source after the other.

    A training stream (:func:`mdm_jax.data.train_iterator`) draws them by ``weights``, relative to
    each other; the number of rows of each if None. ValueError unless they are positive, finite and
    as many as the sources, of which there are at most 255.
    """

    def __init__(self, parts: Sequence[RowSource], weights: Sequence[float] | None = None):
        weights = [len(part) for part in parts] if weights is None else weights
        numbers = np.asarray(weights, np.float64)
        if not 0 < len(parts) == len(numbers) < 256 or not np.all((numbers > 0) & (numbers < 1e30)):
            raise ValueError(
                f"a mixture needs 1 to 255 sources with a positive weight each, got {len(parts)} "
                f"sources and weights {list(weights)}"
            )
        self.parts = tuple(parts)
        self.weights = tuple((numbers / numbers.sum()).tolist())
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _read(self, indices: np.ndarray) -> Batch:
        part = np.searchsorted(self._ends, indices, side="right")
        order, batches = np.argsort(part, kind="stable"), []
        for number in np.unique(part):
            first = self._ends[number] - len(self.parts[number])
            batches.append(gather(self.parts[number], indices[part == number] - first))
        if not batches:
            return gather(self.parts[0], indices)
        back = np.argsort(order)
        return Batch(*(np.concatenate(field)[back] for field in zip(*batches)))


class RandomlyCut(VectorisedRows):
    """Rows of a source of which a training stream cuts some short, others on each visit.

    With probability ``share`` the eligible tokens of a document end after the first n, with n
    uniform from 1 to all of them; what follows is padding, neither eligible nor attended to, so a
    model does not see from the length of the row where an answer ends. A function of the stream's
    seed, the example and the visit. Read otherwise, rows are whole.

    Dream's collator cuts a batch to the length of one of its answers; here it is by example, so
    it does not depend on the batch. ``character_counts`` [K] are those of the tokenizer.
    """

    def __init__(self, source: RowSource, share: float, pad_id: int, character_counts: np.ndarray):
        self.source, self._share = source, share
        self._pad_id, self._character_counts = pad_id, character_counts

    def __len__(self) -> int:
        return len(self.source)

    def _read(self, indices: np.ndarray) -> Batch:
        return gather(self.source, indices)

    def examples(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return examples(self.source, indices, gather(self.source, indices[:1]).tokens.shape[1])

    @property
    def num_examples(self) -> int:
        return getattr(self.source, "num_examples", len(self.source))

    def visit(self, indices: np.ndarray, visits: np.ndarray, seed: tuple[int, ...]) -> Batch:
        """Rows ``indices`` [n] at the visits [n] of a stream with this seed."""
        batch = Batch(*(np.array(field) for field in gather(self.source, indices)))
        tokens, eligible, documents, _ = batch
        numbers, _ = self.examples(indices)
        for i, number in [(j, d) for j, row in enumerate(documents) for d in np.unique(row)]:
            inside = documents[i] == number
            places = np.flatnonzero(inside & eligible[i])
            if not number or not len(places):
                continue
            rng = np.random.default_rng((*seed, int(visits[i]), int(numbers[i, places[0]])))
            if rng.random() < self._share:
                rest = inside & (np.arange(len(inside)) > places[rng.integers(len(places))])
                tokens[i, rest], eligible[i, rest], documents[i, rest] = self._pad_id, False, 0
        return _text_rows(tokens, documents, self._character_counts, eligible)


@dataclasses.dataclass(frozen=True, eq=False)
class Buckets:
    """Rows of a training stream by length, for batches of rows of about one length.

    A row stands in the first of ``lengths`` that holds it from its first visible token (document
    above 0), or the multiple of ``align`` before that, to the last; :meth:`cut` leaves out the
    columns around it. So neither its tokens nor their noise depend on the length it stands in.

    Attributes:
        lengths: ascending; the last is that of all rows.
        rows: [bucket][part] numbers of the rows of each part of a mixture (of the source itself).
        shares: [bucket][part] of the rows of a stream; they sum to 1.
        mean_eligible: eligible tokens of a row of the stream, on average (of rows read whole).
        padding: share of padding in batches of one length each, and without buckets.
    """

    lengths: tuple[int, ...]
    rows: tuple[tuple[np.ndarray, ...], ...]
    shares: tuple[tuple[float, ...], ...]
    mean_eligible: float
    padding: tuple[float, float]
    align: int = 1

    def cut(self, batch: NamedTuple, bucket: int) -> NamedTuple:
        """``batch`` [n, L] of rows of a bucket as [n, its length]."""
        length, visible = self.lengths[bucket], batch.documents > 0
        columns = _starts(visible, self.align)[:, None] + np.arange(length)
        inside = columns < visible.shape[1]
        columns = np.minimum(columns, visible.shape[1] - 1)
        short = {
            name: field[np.arange(len(field))[:, None], columns]
            for name, field in batch._asdict().items()
            if field.ndim > 1
        }
        short["eligible"] &= inside
        short["documents"] = short["documents"] * inside
        return batch._replace(**short)

    def describe(self) -> str:
        """One line for reports."""
        counts = (
            f"{length} ({sum(map(len, rows)):,} rows, {sum(shares):.0%} of those drawn)"
            for length, rows, shares in zip(self.lengths, self.rows, self.shares)
        )
        own, whole = self.padding
        return (
            f"batches of one length each: {', '.join(counts)}; {own:.0%} of their positions are "
            f"padding, {whole:.0%} where all rows have {self.lengths[-1]}"
        )


def _starts(visible: np.ndarray, align: int) -> np.ndarray:
    return np.argmax(visible, 1) // align * align


def bucketed(source: RowSource, lengths: Sequence[int], batch_size: int, align: int = 1) -> Buckets:
    """Sort the rows of a training stream into ``lengths`` besides their own, the longest.

    Reads all rows once. A length with fewer rows than a batch takes the longest of those below it;
    the lowest go up if they have fewer; a length without rows is left out.

    ValueError unless lengths are ascending multiples of ``align`` up to that of the rows, and some
    row is shorter.
    """
    parts, weights = parts_of(source)
    whole = gather(source, np.arange(1)).tokens.shape[1]
    wanted = tuple(lengths) if lengths[-1:] == (whole,) else (*lengths, whole)
    ascending = all(a < b for a, b in zip((0, *wanted), wanted))
    if not ascending or any(length % align for length in wanted):
        raise ValueError(
            f"buckets={tuple(lengths)} must be ascending lengths of at most {whole} tokens, that "
            f"of a row{f', and multiples of {align}' if align > 1 else ''}"
        )
    found = []
    for part in parts:
        for start in range(0, len(part), 1024):
            batch = gather(part, np.arange(start, min(start + 1024, len(part))))
            shown = batch.documents > 0
            ends = np.where(shown.any(1), whole - np.argmax(shown[:, ::-1], 1), 0)
            found.append([ends - _starts(shown, align), shown.sum(1), batch.eligible.sum(1)])
    sizes, visible, eligible = np.concatenate(found, axis=1)
    counts = [len(part) for part in parts]
    drawn = np.repeat(np.divide(weights, counts), counts)  # share of each row
    order = np.argsort(sizes, kind="stable")
    ends = np.searchsorted(sizes[order], wanted, side="right")
    for at in range(len(ends) - 1, 0, -1):
        ends[at - 1] = min(ends[at - 1], ends[at])  # longer ones may have taken them all
        if ends[at - 1] < ends[at]:
            ends[at - 1] = min(ends[at - 1], max(ends[at] - batch_size, 0))
    ends[:-1][ends[:-1] < batch_size] = 0
    kept = [(n, np.sort(rows)) for n, rows in zip(wanted, np.split(order, ends[:-1])) if len(rows)]
    if [n for n, _ in kept] == [whole]:
        raise ValueError(
            f"buckets={tuple(lengths)}: no batch of {batch_size} rows is shorter than {whole} "
            "tokens, so there is nothing to gain; answer_padding='eos_scored' trains EOS to the "
            "end of every row (take 'eos_once' or 'pad_hidden'), and packing fills rows"
        )
    firsts = np.cumsum([0, *counts])
    pieces = [np.split(rows, np.searchsorted(rows, firsts[1:-1])) for _, rows in kept]
    positions = float(sum(n * drawn[rows].sum() for n, rows in kept))
    tokens = float(drawn @ visible)
    return Buckets(
        lengths=tuple(n for n, _ in kept),
        rows=tuple(tuple(piece - first for piece, first in zip(each, firsts)) for each in pieces),
        shares=tuple(tuple(float(drawn[piece].sum()) for piece in each) for each in pieces),
        mean_eligible=float(drawn @ eligible),
        padding=(1 - tokens / positions, 1 - tokens / whole),
        align=align,
    )


def parts_of(source: RowSource) -> tuple[tuple[RowSource, ...], tuple[float, ...]]:
    """The parts of a mixture and their shares of a stream; those of another source: itself."""
    if isinstance(source, Mixture):
        return source.parts, source.weights
    return (source,), (1.0,)


def leaves(source: RowSource) -> list[RowSource]:
    """The sources that a mixture, or rows cut at random, are made of; else the source."""
    if isinstance(source, RandomlyCut):
        return leaves(source.source)
    if isinstance(source, Mixture):
        return [leaf for part in source.parts for leaf in leaves(part)]
    return [source]


def examples(source: RowSource, indices: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Example of each token of rows ``indices`` [n] and position in it, [n, L] each.

    A row is an example unless its source says otherwise, by a method of this name.
    """
    if hasattr(source, "examples"):
        return source.examples(indices)
    shape = (len(indices), length)
    return (
        np.broadcast_to(np.asarray(indices)[:, None], shape),
        np.broadcast_to(np.arange(length), shape),
    )


def example_keys(
    source: RowSource, indices: np.ndarray, visits: np.ndarray, part: int, length: int
) -> np.ndarray:
    """What keys the noise of rows ``indices`` [n], [n, L, 2] uint32 (``KeyedBatch``).

    The words are the number of the visit of the example, counted over all visits of all examples,
    modulo 2**32, and the source (8 bits) before the position in the example (24 bits).

    Args:
        visits: [n] visits of each row before this one.
        part: number of the source in its mixture, in [0, 255].
    """
    numbers, positions = examples(source, indices, length)
    count = getattr(source, "num_examples", len(source))
    first = (visits[:, None] * count + numbers) & 0xFFFFFFFF
    return np.stack([first, (part << 24) | positions], axis=-1).astype(np.uint32)
