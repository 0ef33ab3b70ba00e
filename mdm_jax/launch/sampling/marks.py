"""Generated text told apart from given text: by colour, or by brackets."""

import os
from collections.abc import Sequence
from typing import TextIO

import numpy as np

from mdm_jax import data
from mdm_jax.launch.sampling.requests import MASK_TEXT
from mdm_jax.launch.sampling.screen import RESET

_COLOUR = "\x1b[1;32m"


def parts(codec: data.Tokenizer, tokens: np.ndarray, generated: np.ndarray) -> list[str]:
    """The text of ``tokens`` [n] cut where ``generated`` [n] changes, given text first.

    Every second part is generated; the first or the last may be empty. A character whose bytes are
    on both sides of a cut belongs to the later part.
    """
    cuts = np.flatnonzero(np.diff(np.append(False, generated)))
    whole = codec.decode(tokens, mask_text=MASK_TEXT)
    ends = [_shared(codec.decode(tokens[:cut], mask_text=MASK_TEXT), whole) for cut in cuts]
    ends = np.maximum.accumulate([0, *ends, len(whole)])
    return [whole[begin:end] for begin, end in zip(ends, ends[1:])]


def marked(pieces: Sequence[str], colour: bool) -> str:
    """Parts as one text without power over a terminal, generated ones in colour, or in ⟦⟧."""
    left, right = (_COLOUR, RESET) if colour else ("⟦", "⟧")
    return "".join(
        f"{left}{data.printable(piece)}{right}" if i % 2 and piece else data.printable(piece)
        for i, piece in enumerate(pieces)
    )


def in_colour(out: TextIO) -> bool:
    """Whether a stream is a terminal and NO_COLOR is not set."""
    return out.isatty() and not os.environ.get("NO_COLOR")


def _shared(text: str, whole: str) -> int:
    """Characters at the beginning that both have."""
    return len(os.path.commonprefix([text, whole]))
