"""Row sources held in memory: spans of a token stream, stored rows, pictures."""

import abc

import numpy as np

from mdm_jax.batches import Batch


class VectorisedRows(abc.ABC):
    """A row source defined by ``rows``, which reads many rows at once."""

    @abc.abstractmethod
    def rows(self, indices: np.ndarray) -> Batch:
        """The rows of these numbers, stacked; IndexError outside [0, len)."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    def __getitem__(self, index: int) -> Batch:
        """One row; IndexError outside [0, len)."""
        return Batch(*(field[0] for field in self.rows(np.asarray([index], np.int64))))

    def _check(self, indices: np.ndarray) -> np.ndarray:
        # Negative indices would wrap around in NumPy and hide a mistake.
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(
                f"row indices must be in [0, {len(self)}), got {indices.min()} to {indices.max()}"
            )
        return indices

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} rows)"


class TokenSpans(VectorisedRows):
    """Rows that are spans of one token array, padded at the end where a span is short.

    Args:
        tokens: [n] int32.
        starts: first token of each row, a range or [rows] integers.
        length: L.
        pad_id: id to fill up with; filled positions are not eligible and belong to document 0.
        character_counts: [K], characters per id; a row's ``units`` is their sum.
        ends: [rows] one past the last token of each row; None: L after the start, or the end of
            ``tokens``.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        starts: range | np.ndarray,
        length: int,
        pad_id: int,
        character_counts: np.ndarray,
        ends: np.ndarray | None = None,
    ):
        self.tokens = tokens
        self.length = length
        self._starts = starts
        self._ends = ends
        self._pad_id = pad_id
        self._character_counts = character_counts

    def __len__(self) -> int:
        return len(self._starts)

    def rows(self, indices: np.ndarray) -> Batch:
        """Rows ``indices`` [n] as a batch with a leading axis of n."""
        indices = self._check(indices)
        if isinstance(self._starts, range):
            starts = self._starts.start + self._starts.step * indices
        else:
            starts = self._starts[indices]
        ends = len(self.tokens) if self._ends is None else self._ends[indices][:, None]
        positions = starts[:, None] + np.arange(self.length)
        eligible = positions < ends
        found = self.tokens[np.minimum(positions, len(self.tokens) - 1)]
        characters = self._character_counts[found] * eligible
        return Batch(
            tokens=np.where(eligible, found, np.int32(self._pad_id)).astype(np.int32),
            eligible=eligible,
            documents=eligible.astype(np.int32),
            units=characters.sum(axis=1, dtype=np.int32),
        )


class PackedSpans(VectorisedRows):
    """Rows of several spans of one token array each, padded at the end.

    The spans of a row are its documents 1, 2, ..., in order; padding is document 0 and not
    eligible.

    Args:
        tokens: [n] int32.
        starts: [P] first token of each span.
        ends: [P] one past its last.
        rows: [P] the row of each span, every number below the largest in use.
        length: L; the spans of a row have at most so many tokens together.
        pad_id: id to fill up with.
        character_counts: [K], characters per id; a row's ``units`` is their sum.
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
    ):
        order = np.argsort(rows, kind="stable")
        self.tokens = tokens
        self.length = length
        self._starts, self._ends = starts[order], ends[order]
        self._num_rows = int(rows.max()) + 1 if len(rows) else 0
        self._first = np.searchsorted(rows[order], np.arange(self._num_rows + 1))
        self._pad_id = pad_id
        self._character_counts = character_counts

    def __len__(self) -> int:
        return self._num_rows

    def rows(self, indices: np.ndarray) -> Batch:
        """Rows ``indices`` [n] as a batch with a leading axis of n."""
        indices = self._check(indices)
        tokens = np.full((len(indices), self.length), self._pad_id, np.int32)
        documents = np.zeros_like(tokens)
        for place, row in enumerate(indices):
            spans = slice(self._first[row], self._first[row + 1])
            offset = 0
            for number, (start, end) in enumerate(zip(self._starts[spans], self._ends[spans]), 1):
                there = slice(offset, offset + end - start)
                tokens[place, there] = self.tokens[start:end]
                documents[place, there] = number
                offset = there.stop
        eligible = documents > 0
        characters = self._character_counts[tokens] * eligible
        return Batch(tokens, eligible, documents, characters.sum(axis=1, dtype=np.int32))


class StoredRows(VectorisedRows):
    """Rows that are stored as they will be read: a Batch with a leading axis of all rows."""

    def __init__(self, batch: Batch):
        self._batch = batch

    def __len__(self) -> int:
        return len(self._batch.tokens)

    def rows(self, indices: np.ndarray) -> Batch:
        """Rows ``indices`` [n] as a batch with a leading axis of n."""
        indices = self._check(indices)
        return Batch(*(field[indices] for field in self._batch))


class PictureRows(VectorisedRows):
    """Flattened pictures whose every element is eligible.

    Args:
        levels: [rows, L] uint8, quantised intensities.
    """

    def __init__(self, levels: np.ndarray):
        self.levels = levels

    def __len__(self) -> int:
        return len(self.levels)

    def rows(self, indices: np.ndarray) -> Batch:
        """Rows ``indices`` [n] as a batch with a leading axis of n."""
        tokens = self.levels[self._check(indices)].astype(np.int32)
        return Batch(
            tokens=tokens,
            eligible=np.ones(tokens.shape, bool),
            documents=np.ones(tokens.shape, np.int32),
            units=np.full(len(tokens), tokens.shape[1], np.int32),
        )
