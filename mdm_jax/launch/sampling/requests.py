"""What a model is asked to write: prompts, texts with places to fill, and their rows.

In a text with places, ``▁▁5`` is a gap of five tokens and ``▁▁`` one of as many as fit; ``▁▁{5}``
and ``▁▁{}`` say the same before a digit or a brace. A ▁ that is text is written ``\\▁``.
"""

import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mdm_jax import data, files

MASK_TEXT = "▁"
_MARKS = re.compile(r"\\▁|▁▁(?:\{([0-9]*)\}|([0-9]*))|▁")
_HOW = "write ▁▁5 for five tokens, ▁▁ for as many as fit, \\▁ for the character"
_FIELDS = {"prompt": str, "infill": str, "length": int}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A text to write, by what is given of it.

    Attributes:
        prompt: what the data have as a prompt, or else the beginning; None: none.
        texts, gaps: pieces after it, and the gaps between them, one fewer; tokens, None for as many
            as fit.
        rest: what follows is written too.
        length: tokens of the rest and of each gap without a number; None: as many as fit.
        asked: the fields of it that a record repeats.
        origin: where it was given, for errors.
    """

    prompt: str | None = None
    texts: tuple[str, ...] = ("",)
    gaps: tuple[int | None, ...] = ()
    rest: bool = False
    length: int | None = None
    asked: tuple[tuple[str, Any], ...] = ()
    origin: str = ""

    @property
    def kind(self) -> str:
        if self.gaps:
            return "infill"
        return "free" if self.prompt is None else "prompt"


def make_request(
    origin: str,
    prompt: str | None = None,
    infill: str | None = None,
    length: int | None = None,
) -> Request:
    """The request for a continuation of ``prompt``, or a text with places, or both in a row.

    ValueError, naming ``origin``, for an empty prompt, a malformed place, or none, or a length
    that nothing takes.
    """
    if prompt == "":
        raise ValueError(f"{origin}: the prompt is empty; leave it out for a text from nothing")
    if length is not None and length < 1:
        raise ValueError(f"{origin}: length must be at least 1 token, got {length}")
    given = {"prompt": prompt, "infill": infill}
    own: dict[str, Any] = {
        "asked": tuple((name, text) for name, text in given.items() if text is not None),
        "prompt": prompt,
        "length": length,
        "origin": origin,
    }
    if infill is None:
        return Request(**own, rest=True)
    texts, gaps = _parsed(infill, origin)
    if length is not None and None not in gaps:
        raise ValueError(
            f"{origin}: length={length} is that of places without a number, and all of "
            f"{infill!r} have one; leave it out, or write ▁▁"
        )
    return Request(**own, texts=texts, gaps=gaps)


def read_requests(path: files.Path, length: int | None = None) -> list[Request]:
    """Requests of a file of JSON lines: texts, or objects with prompt, infill and length.

    A text is a prompt, or one with places if there is a ▁ in it. ``length`` is for those that state
    none. ValueError names file and line.
    """
    requests = []
    for origin, value in files.read_records(path):
        if isinstance(value, str):
            value = {"infill" if MASK_TEXT in value else "prompt": value}
        if not isinstance(value, dict) or not {"prompt", "infill"} & {*value}:
            raise ValueError(
                f"{origin}: a line is a text, or an object with prompt, infill or both, got "
                f"{str(value)[:80]}"
            )
        for name, field in value.items():
            if name not in _FIELDS:
                raise ValueError(f"{origin}: unknown field {name!r}, not of {[*_FIELDS]}")
            if not isinstance(field, _FIELDS[name]) or isinstance(field, bool):
                raise ValueError(
                    f"{origin}: {name} must be {_FIELDS[name].__name__}, got {str(field)[:80]!r}"
                )
        sized = "infill" in value and None not in _parsed(value["infill"], origin)[1]
        requests.append(make_request(origin, **({} if sized else {"length": length}) | value))
    if not requests:
        raise ValueError(f"{path}: the file is empty; write a prompt a line")
    return requests


def line_request(text: str, origin: str, length: int | None = None) -> Request:
    """The request of a line of a text file: each ▁ is a token, and the rest is written too."""
    prompt, *rest = text.split(MASK_TEXT)
    return Request(
        prompt=prompt,
        texts=("", *rest),
        gaps=(1,) * len(rest),
        rest=True,
        length=length,
        asked=(("infill" if rest else "prompt", text),),
        origin=origin,
    )


def check_known(request: Request, codec: data.Tokenizer) -> None:
    """Raise ValueError that names characters outside the vocabulary."""
    text = (request.prompt or "") + "".join(request.texts)
    if unknown := codec.unknown_in(text):
        found = (f"{c!r} ({n})" for c, n in collections.Counter(unknown).items())
        raise ValueError(
            f"{request.origin}: outside the vocabulary of this run: {', '.join(found)}; leave them "
            "out, or train with a tokenizer that has them, as in data.tokenizer=byte"
        )


class Rows(NamedTuple):
    """How rows of a run hold texts.

    Attributes:
        sizes: positions of training texts drawn at random, EOS included.
        fill: a training text, with the EOS behind it, fills its row.
        layout: of prompts and answers (``data.PairLayout``, ``chats.ChatLayout``); None: of none.
        left_to_right: the model ends a text by itself and sees nothing behind a gap.
        block_size: tokens that see each other, where later ones are not seen; None: all do.
    """

    dataset: data.Dataset
    sizes: np.ndarray
    fill: bool
    layout: Any
    left_to_right: bool
    block_size: int | None


def rows_of(
    dataset: data.Dataset, left_to_right: bool = False, block_size: int | None = None
) -> Rows:
    """Rows of a data set of text, by 256 of its training rows."""
    rng = np.random.default_rng(0)
    seen = data.gather(dataset.train, rng.integers(len(dataset.train), size=256)).documents
    layout = dataset.layout
    if layout is not None and (left_to_right or np.all(seen[:, -1])):
        # The model ends answers by itself, or all of them end at the last position.
        layout = dataclasses.replace(layout, answer_padding="eos_scored")
    numbered = seen + (np.max(seen) + 1) * np.arange(len(seen))[:, None]
    sizes = np.unique(numbered[seen > 0], return_counts=True)[1]
    fill = bool(np.all(sizes == dataset.length))
    return Rows(dataset, sizes, fill, layout, left_to_right, block_size)


def _parsed(text: str, origin: str) -> tuple[tuple[str, ...], tuple[int | None, ...]]:
    """Pieces of a text with places, and the gaps between them; ValueError if malformed."""
    texts, gaps, end = [""], [], 0
    for mark in _MARKS.finditer(text):
        texts[-1] += text[end : mark.start()]
        touches, end = mark.start() == end and bool(gaps) and not texts[-1], mark.end()
        if mark[0] == "\\▁":
            texts[-1] += MASK_TEXT
            continue
        number = mark[1] or mark[2] or None
        wrong = number is not None and (len(number) > 6 or int(number) < 1)
        if mark[0] == MASK_TEXT or touches or wrong:
            shown = text[max(0, mark.start() - 20) : mark.end() + 10]
            raise ValueError(f"{origin}: malformed place {mark[0]!r} in {shown!r}; {_HOW}")
        gaps.append(number and int(number))
        texts.append("")
    texts[-1] += text[end:]
    if not gaps:
        raise ValueError(f"{origin}: {text[:80]!r} has no place to fill; {_HOW}")
    return tuple(texts), tuple(gaps)


def lay_out(
    request: Request, rows: Rows, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Canvas and documents [L] of a request, laid out as training rows are.

    Where rows show how long a text is, one without a length is as long as a training text drawn
    with ``rng`` from those with room for it. A text of a given length, or with an end, ends with
    EOS where the data have EOS. ValueError if it does not fit, or if the process cannot fill it.
    """
    try:
        canvas, documents, words = _laid_out(request, rows, rng)
    except ValueError as error:
        raise ValueError(f"{request.origin}: {error}; change it") from error
    _check_seen(request, canvas, documents, words, rows)
    return canvas, documents


def _laid_out(
    request: Request, rows: Rows, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, int]:
    """Canvas and documents [L], and the tokens of the text without EOS behind it."""
    dataset, codec, layout = rows.dataset, rows.dataset.tokenizer, rows.layout
    prompt, texts = request.prompt, list(request.texts)
    if layout is not None and prompt is None:
        prompt, texts[0] = texts[0], ""
    head = getattr(layout, "encode_prompt", codec.encode)(prompt or "")
    pieces = [codec.encode(text) for text in texts]
    gaps = [*request.gaps, *[None] * request.rest]
    least = [int(gap is None) for gap in request.gaps] + [int(not request.gaps)] * request.rest
    used = len(head) + sum(map(len, pieces)) + sum(gap or 0 for gap in gaps)
    shares = request.length is None and None in gaps
    open_end = shares and gaps[-1] is None and (request.rest or not texts[-1])
    closing = not open_end and codec.eos_id not in dataset.absent_ids
    fills = rows.fill if layout is None else layout.answer_padding == "eos_scored"
    end = dataset.length
    if layout is not None and not fills and None in request.gaps and shares:
        raise ValueError("rows show where the answer ends: give ▁▁ a number, or a length")
    if isinstance(layout, data.PairLayout):
        end = len(head) + layout.answer_length
    elif layout is None and shares and not rows.left_to_right:
        enough = rows.sizes[rows.sizes >= used + closing + sum(least)]
        end = rng.choice(enough) if len(enough) else end
    if layout is not None and not fills and shares:  # the rest, of which the layout says more
        sizes = [gap or 0 for gap in gaps]
    else:
        sizes = _sizes(gaps, least, request.length, end - used - closing)
    ids = [head]
    for piece, size in zip(pieces, [*sizes, 0]):
        ids += [piece, np.full(size, dataset.mask_id, np.int32)]
    words = sum(map(len, ids))
    if words + closing > dataset.length and not isinstance(layout, data.PairLayout):
        needs = "in which at least one is generated"
        if request.length is not None or len(sizes) > 1:
            needs = f"with {words - used} more to generate"
        raise ValueError(f"{used} tokens do not fit a row of {dataset.length} {needs}")
    if closing:
        ids.append(np.full(max(1, end - words) if fills else 1, codec.eos_id, np.int32))
    ids = np.concatenate(ids).astype(np.int32)
    if layout is not None:
        first = (len(head),) if isinstance(layout, data.PairLayout) else ()
        row = layout.to_answer(ids, codec, *first)
        canvas, documents = row.tokens[0], row.documents[0]
    else:
        documents = (np.arange(dataset.length) < len(ids)).astype(np.int32)
        canvas = np.full(dataset.length, codec.pad_id, np.int32)
        canvas[: len(ids)] = ids
    return canvas, documents, words


def _sizes(
    gaps: Sequence[int | None], least: Sequence[int], length: int | None, room: int
) -> list[int]:
    """Tokens of each gap: those without a number have ``length``, or share the ``room`` evenly."""
    free = [i for i, gap in enumerate(gaps) if gap is None]
    sizes = [gap or 0 for gap in gaps]
    for i, part in zip(free, np.array_split(np.arange(max(room, 0)), max(len(free), 1))):
        sizes[i] = max(len(part), least[i]) if length is None else length
    return sizes


def _check_seen(
    request: Request, canvas: np.ndarray, documents: np.ndarray, words: int, rows: Rows
) -> None:
    """Raise ValueError for given text that a gap before it would not see."""
    size, masked = rows.block_size, canvas == rows.dataset.mask_id
    if size is None or not masked.any():
        return
    places = np.arange(len(canvas))
    text = ~masked & (documents > 0) & (places < np.argmax(documents > 0) + words)
    if not np.any(places[text] // size > np.argmax(masked) // size):
        return
    how = "an autoregressive model writes from left to right, and a gap does not see text behind it"
    if size > 1:
        how = (
            f"block diffusion writes blocks of {size} tokens from left to right, and a gap does not"
            " see text in later blocks"
        )
    raise ValueError(
        f"{request.origin}: {how}; give what is before the gap as a prompt, or take a masked run"
    )
