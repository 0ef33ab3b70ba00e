"""What a data source produces, and the one way to read rows out of it."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from mdm_jax.batches import Batch
from mdm_jax.data.tokenizers import Tokenizer

SPLITS = ("train", "valid", "test")


@runtime_checkable
class RowSource(Protocol):
    """Random access to rows.

    A source may also have ``rows(indices [n]) -> Batch`` with a leading axis of n, which is then
    used to read a batch at once.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch:
        """One row: fields [L], [L], [L] and [] of :class:`mdm_jax.batches.Batch`, NumPy arrays."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Three splits and what is known about them.

    Attributes:
        train: rows to learn from.
        valid: rows to choose by; may have length 0 where a source was asked for none.
        test: rows to report on; may have length 0.
        tokenizer: how text became ids; None for images.
        vocab_size: K, ids of a row lie in [0, K); ``mask_id`` is K - 1.
        mask_id: id of the mask, which no clean row holds.
        length: L, elements of a row.
        unit: what ``Batch.units`` counts, hence what likelihood is reported per.
        event_shape: shape of a picture, product L; None for text.
        fingerprint: SHA-256 of the content and of every setting that changes the rows.
        description: what it is, sizes, source, licence, and every policy that removed something.
        report: counts of what was read and of everything that was changed or left out.
        check: ``check(prompt, answer)``, whether a text is a right answer; None where nobody knows.
    """

    train: RowSource
    valid: RowSource
    test: RowSource
    tokenizer: Tokenizer | None
    vocab_size: int
    mask_id: int
    length: int
    unit: Literal["character", "dimension"]
    event_shape: tuple[int, ...] | None
    fingerprint: str
    description: str
    report: Mapping[str, int]
    check: Callable[[str, str], bool] | None = None

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}")
        if self.mask_id != self.vocab_size - 1:
            raise ValueError(
                f"mask_id must be the last id, {self.vocab_size - 1}, got {self.mask_id}"
            )
        if self.tokenizer is not None and self.tokenizer.vocab_size != self.vocab_size:
            raise ValueError(
                f"vocab_size {self.vocab_size} differs from the tokenizer's "
                f"{self.tokenizer.vocab_size}"
            )
        if self.unit not in ("character", "dimension"):
            raise ValueError(f"unit must be 'character' or 'dimension', got {self.unit!r}")
        if self.event_shape is not None and math.prod(self.event_shape) != self.length:
            raise ValueError(f"event_shape {self.event_shape} does not hold {self.length} elements")


def gather(source: RowSource, indices: Sequence[int] | np.ndarray) -> Batch:
    """Rows ``indices`` [n] of ``source`` as one batch with a leading axis of n."""
    if hasattr(source, "rows"):
        return source.rows(np.asarray(indices, np.int64))
    rows = [source[int(i)] for i in indices]
    return Batch(*(np.stack(field) for field in zip(*rows)))


def fingerprint_of(content: bytes, settings: Mapping[str, Any]) -> str:
    """SHA-256 over ``content`` and the JSON form of ``settings``, hexadecimal."""
    digest = hashlib.sha256(hashlib.sha256(content).digest())
    digest.update(json.dumps(settings, sort_keys=True).encode("utf-8"))
    return digest.hexdigest()


def split_bounds(size: int, fractions: Sequence[float], origin: str) -> tuple[int, int]:
    """Where valid and test begin when ``size`` items are split in order by ``fractions``.

    Raises:
        ValueError: if the fractions are not three non-negative numbers with sum 1, or if a split
            that should hold something would be empty.
    """
    if (
        len(fractions) != 3
        or any(not 0 <= f <= 1 for f in fractions)
        or not math.isclose(sum(fractions), 1.0, abs_tol=1e-6)
    ):
        raise ValueError(
            f"fractions must be three non-negative numbers (train, valid, test) with sum 1, got "
            f"{tuple(fractions)}"
        )
    first = round(size * fractions[0])
    second = size if fractions[2] == 0 else round(size * (fractions[0] + fractions[1]))
    for name, fraction, count in zip(SPLITS, fractions, (first, second - first, size - second)):
        if count == 0 and (fraction > 0 or name == "train"):
            raise ValueError(
                f"{origin}: too small, the {name} split would be empty ({size} items, fractions "
                f"{tuple(fractions)}); give a larger file or other fractions"
            )
    return first, second


def check_positive(name: str, value: int) -> None:
    """Raises ValueError unless ``value`` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def describe(
    headline: str, tokenizer: Tokenizer | None, policy: str, report: Mapping[str, int]
) -> str:
    """A few lines: what it is, tokenizer, policies, and every count that is not zero."""
    lines = [headline]
    if tokenizer is not None:
        lines.append(
            f"Tokenizer: {tokenizer.kind}, {tokenizer.vocab_size} ids with padding, EOS and mask."
        )
    lines.append(policy)
    counts = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in report.items() if n)
    return "\n".join([*lines, f"Counts: {counts}."])
