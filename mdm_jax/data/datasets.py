"""Datasets: three splits of rows and their metadata; rows of prompts and answers."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import (
    Annotated,
    Any,
    Literal,
    get_args,
)

import numpy as np
from numpy.typing import ArrayLike

from mdm_jax.checks import Real, Whole
from mdm_jax.data.rows import RowSource
from mdm_jax.data.tokenizers import Tokenizer, printable
from mdm_jax.types import Batch

SPLITS = ("train", "valid", "test")
TextField = Annotated[str, "key or feature that holds the text"]

AnswerPadding = Annotated[
    Literal["eos_scored", "eos_once", "pad_hidden"],
    "after the answer: EOS to the row's end, all of it learned or the first; padding not seen",
]


@dataclasses.dataclass(frozen=True)
class PairLayout:
    """Rows ``[PAD ... prompt][answer ...]``: where pairs stand, to train, to score and to answer.

    The prompt is right-aligned and never eligible, its padding not attended to. After the answer,
    which includes its EOS: "eos_scored", more EOS, eligible; "eos_once", EOS, and "pad_hidden",
    padding, neither eligible nor attended to.
    """

    prompt_length: int
    answer_length: int
    answer_padding: AnswerPadding

    @property
    def length(self) -> int:
        """L, positions of a row."""
        return self.prompt_length + self.answer_length

    def misfit(self, prompt: ArrayLike, answer: ArrayLike) -> str:
        """Why token ids do not fit; "" if they do."""
        if len(prompt) <= self.prompt_length and len(answer) <= self.answer_length:
            return ""
        return (
            f"too long, the prompt has {len(prompt)} tokens (prompt_length {self.prompt_length}) "
            f"and the answer with its EOS {len(answer)} (answer_length {self.answer_length})"
        )

    def rows(
        self,
        prompts: Sequence[ArrayLike],
        answers: Sequence[ArrayLike],
        *,
        pad_id: int,
        eos_id: int | None = None,
        units: ArrayLike | None = None,
    ) -> Batch:
        """Rows [N, L] of N prompts and N answers, token ids; ValueError if one does not fit.

        ``units``: [N] characters of each answer, None: its eligible tokens. "pad_hidden" does not
        read ``eos_id``.
        """
        shape = (len(prompts), self.length)
        tokens = np.full(shape, pad_id, np.int32)
        eligible, documents = np.zeros(shape, bool), np.zeros(shape, np.int32)
        middle = self.prompt_length
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            if misfit := self.misfit(prompt, answer):
                raise ValueError(f"pair {row}: {misfit}")
            begin, end = middle - len(prompt), middle + len(answer)
            visible_end = self.length if self.answer_padding == "eos_scored" else end
            tokens[row, begin:middle], tokens[row, middle:end] = prompt, answer
            if self.answer_padding != "pad_hidden":
                tokens[row, end:] = eos_id
            eligible[row, middle:visible_end] = True
            documents[row, begin:visible_end] = 1
        units = eligible.sum(1) if units is None else units
        return Batch(tokens, eligible, documents, np.asarray(units, np.int32))

    def to_answer(self, ids: np.ndarray, codec: Tokenizer, first: int | None = None) -> Batch:
        """The row [1, L] of a prompt whose answer is to be generated, masked there.

        ``ids`` [n]: the prompt and, from ``first`` on (None: the first mask), the answer as far as
        it is known; under "eos_scored" the rest is masked too. Otherwise rows show where the answer
        ends: ValueError without a mask, as if something does not fit.
        """
        if first is None:
            first = np.flatnonzero(np.append(ids, codec.mask_id) == codec.mask_id)[0]
        prompt, answer = ids[:first], ids[first:]
        if misfit := self.misfit(prompt, answer):
            raise ValueError(misfit)
        if self.answer_padding == "eos_scored":
            rest = self.answer_length - len(answer)
            answer = np.append(answer, np.full(rest, codec.mask_id, np.int32))
        if not len(answer):
            raise ValueError(
                f"rows show where the answer ends (answer_padding={self.answer_padding!r}); say so "
                "by a length, or in a text file by one ▁ after the prompt for each token of the "
                "answer and one for its EOS"
            )
        return self.rows([prompt], [answer], pad_id=codec.pad_id, eos_id=codec.eos_id)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Three splits and their metadata.

    Attributes:
        train, valid, test: rows to learn from, choose by, report on; the last two may be empty.
        tokenizer, event_shape: None for images; shape of a picture, product L, None for text.
        vocab_size, mask_id: K, ids lie in [0, K); and the one that no clean row holds, K - 1 but
            for tokenizers that say otherwise.
        absent_ids: ids besides the mask that no eligible position holds; samplers leave them out.
        length, unit: L, elements of a row; unit of ``Batch.units`` and of likelihood.
        num_classes: of pictures whose rows name their class (``types.Batch.documents``); 0: none.
        fingerprint: SHA-256 of the content and of every setting that changes the rows.
        description: sizes, source, licence, and every policy that removed something.
        report: counts of what was read, changed or left out.
        check: ``check(prompt, answer)``, whether an answer is right; None where unknown.
        layout: how rows hold prompts and answers (:class:`PairLayout`, ``chats.ChatLayout``); None
            where they hold none.
        columns: of a table (``tables.Column``); () elsewhere.
        rejected: of preference pairs: rejected answers by split, beside the chosen ones that are
            the rows of ``valid`` and ``test``.
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
    absent_ids: tuple[int, ...] = ()
    layout: Any = None
    num_classes: int = 0
    columns: tuple[Any, ...] = ()
    rejected: Mapping[str, RowSource] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}")
        codec, own = self.tokenizer, (self.vocab_size, self.mask_id)
        wanted = (codec.vocab_size, codec.mask_id) if codec else (own[0], own[0] - 1)
        if own != wanted:
            raise ValueError(
                f"vocab_size and mask_id must be "
                f"{'those of the tokenizer' if codec else 'K and the last id'}, {wanted}, got {own}"
            )
        if self.unit not in ("character", "dimension"):
            raise ValueError(f"unit must be 'character' or 'dimension', got {self.unit!r}")
        if self.event_shape is not None and math.prod(self.event_shape) != self.length:
            raise ValueError(f"event_shape {self.event_shape} does not hold {self.length} elements")


def make_dataset(
    rows: Mapping[str, RowSource],
    tokenizer: Tokenizer | None,
    *,
    length: int,
    digest: bytes,
    settings: Mapping[str, Any],
    headline: str,
    policy: str,
    report: Mapping[str, int],
    vocab_size: int | None = None,
    event_shape: tuple[int, ...] | None = None,
    check: Callable[[str, str], bool] | None = None,
    has_eos: bool = True,
    layout: Any = None,
    num_classes: int = 0,
    columns: tuple[Any, ...] = (),
) -> Dataset:
    """Build a :class:`Dataset`, whose arguments these are, with its fingerprint and description.

    Args:
        digest, settings: for the fingerprint: SHA-256 of the content, and JSON values that change
            the rows.
        headline, policy: for the description: first line; what was cut, padded or left out.
        report, vocab_size: counts, nonzero ones are described too; None: the tokenizer's. Without
            a tokenizer the last id is the mask.
        has_eos: whether rows hold EOS; without it, as without padding, samplers do not write it.
    """
    fingerprint = hashlib.sha256(digest + json.dumps(settings, sort_keys=True).encode("utf-8"))
    lines = [headline, policy]
    absent_ids: tuple[int, ...] = ()
    mask_id = vocab_size - 1 if tokenizer is None else tokenizer.mask_id
    if tokenizer is not None:
        vocab_size, eos_id = tokenizer.vocab_size, tokenizer.eos_id
        absent = (tokenizer.pad_id, eos_id, *tokenizer.unused_ids)
        absent_ids = tuple(i for i in dict.fromkeys(absent) if not (has_eos and i == eos_id))
        lines.insert(
            1, f"Tokenizer: {tokenizer.kind}, {vocab_size} ids with padding, EOS and mask."
        )
    counts = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in report.items() if n)
    return Dataset(
        **rows,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        mask_id=mask_id,
        length=length,
        unit="dimension" if tokenizer is None else "character",
        event_shape=event_shape,
        fingerprint=fingerprint.hexdigest(),
        description=printable("\n".join([*lines, f"Counts: {counts}."])),
        report=report,
        check=check,
        absent_ids=absent_ids,
        layout=layout,
        num_classes=num_classes,
        columns=columns,
    )


Length = Annotated[int, Whole("[1, 1e7]", "tokens", "of a row")]
Fractions = Annotated[
    Sequence[float], Real("[0, 1]", "of the data", "for train, valid, test", several=True)
]
VocabSize = Annotated[int, Whole("[259, 1e7]", "tokens", "of the tokenizer that bpe trains")]
Stride = Annotated[int, Whole("[1, 1e7]", "tokens", "between starts of training rows of a text")]


def split_bounds(
    size: int, fractions: Sequence[float], origin: str, items: str = "items"
) -> tuple[int, int]:
    """First index of valid and of test when ``size`` items are split in order by ``fractions``.

    ValueError unless these are >= 0 with sum 1; if train or a split of a positive one is empty.
    """
    in_range = len(fractions) == 3 and all(0 <= f <= 1 for f in fractions)
    if not in_range or not math.isclose(sum(fractions), 1.0, abs_tol=1e-6):
        raise ValueError(
            f"fractions must be three non-negative numbers (train, valid, test) with sum 1, got "
            f"{tuple(fractions)}"
        )
    first = round(size * fractions[0])
    second = size if fractions[2] == 0 else round(size * (fractions[0] + fractions[1]))
    for name, fraction, count in zip(SPLITS, fractions, (first, second - first, size - second)):
        if count == 0 and (fraction > 0 or name == "train"):
            raise ValueError(
                f"{origin}: too small, the {name} split would be empty ({size} {items}, fractions "
                f"{tuple(fractions)}); give a larger file or other fractions"
            )
    return first, second


def shuffled_split(
    size: int, fractions: Sequence[float], seed: int, origin: str, items: str = "items"
) -> dict[str, np.ndarray]:
    """Item numbers of each split after a seeded shuffle; raises as :func:`split_bounds`."""
    bounds = split_bounds(size, fractions, origin, items)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(size)
    return dict(zip(SPLITS, np.split(order, bounds)))


def check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def check_choice(name: str, value: str, literal: Any) -> None:
    """Raise ValueError unless ``value`` is one of an annotated ``typing.Literal``."""
    allowed = get_args(get_args(literal)[0])
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
