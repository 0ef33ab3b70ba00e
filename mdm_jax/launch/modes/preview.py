"""What a run is about to train on: a summary of its rows, and one of them as text."""

import itertools
import os
import re
import sys

import numpy as np

from mdm_jax import data
from mdm_jax.data.statistics import QUANTILES
from mdm_jax.data.tokenizers import Tokenizer
from mdm_jax.types import Batch

_KINDS = {"prompt": "\x1b[36m", "maskable": "\x1b[1;32m", "padding": "\x1b[2m"}
_RESET = "\x1b[0m"
_LONGEST = 1200  # characters of a stretch


def preview(dataset: data.Dataset, colour: bool | None = None) -> str:
    """Lengths, shares and special tokens of the training rows, and the first row; "" for pictures.

    ``colour``: by ANSI codes, else by a legend of brackets; None: if standard output is a terminal
    and NO_COLOR is not set.
    """
    codec, source = dataset.tokenizer, dataset.train
    if codec is None:
        return ""
    if colour is None:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    found = data.summarise_rows(source, codec.eos_id)
    named = {"padding": codec.pad_id, "EOS": codec.eos_id, "mask": codec.mask_id}
    bos = getattr(codec, "bos_id", None)
    if bos not in (None, codec.pad_id):  # padding stands in for a BOS that a model lacks
        named["BOS"] = bos
    at = ", ".join(f"{q:.0%}" for q in QUANTILES)
    lines = [
        f"rows: {found.rows} of {dataset.length} positions, lengths and shares of "
        f"{found.looked_at} of them; quantiles {at}",
        f"  tokens of a text: {_numbers(found.lengths)}; maskable ones of it: "
        f"{_numbers(found.answers)}",
        f"  positions: {found.eligible:.1%} maskable, {found.prompt:.1%} prompt, "
        f"{found.padding:.1%} padding",
        "  special tokens: " + ", ".join(f"{name} {token}" for name, token in named.items()),
        "first training row ("
        + (
            ", ".join(f"{code}{kind}{_RESET}" for kind, code in _KINDS.items())
            if colour
            else "prompt as it is, ⟦maskable⟧, [padding]"
        )
        + ", ␃ is EOS):",
        _rendered(source[0], codec, colour),
    ]
    return "\n".join(lines)


def _numbers(values: tuple[int, ...]) -> str:
    return " ".join(map(str, values))


def _rendered(row: Batch, codec: Tokenizer, colour: bool) -> str:
    """A row by stretches of one kind; documents after the first begin on a line of their own."""
    kinds = np.where(row.eligible, "maskable", np.where(row.documents > 0, "prompt", "padding"))
    pieces, last = [], 0
    for (kind, document), group in itertools.groupby(
        range(len(kinds)), lambda i: (str(kinds[i]), int(row.documents[i]))
    ):
        ids = row.tokens[list(group)]
        text = f"{len(ids)} of padding"
        if kind != "padding":
            # Behind a mask, where EOS is shown.
            text = data.printable(codec.decode(np.append(ids, codec.mask_id), mask_text=""))
            text = re.sub("␃{4,}", lambda found: f"␃×{len(found[0])}", text)
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
        if document and last and document != last:
            pieces.append("\n--\n")
        last = document or last
        if colour:
            pieces.append(f"{_KINDS[kind]}{text}{_RESET}")
        else:
            left, right = {"prompt": ("", ""), "maskable": "⟦⟧", "padding": "[]"}[kind]
            pieces.append(f"{left}{text}{right}")
    return "".join(pieces)
