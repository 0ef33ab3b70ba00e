"""Watching a decoding: the rows in the making, live on a terminal and for a film."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mdm_jax import data
from mdm_jax.launch.sampling import film
from mdm_jax.launch.sampling.marks import in_colour, marked, parts
from mdm_jax.launch.sampling.screen import Screen
from mdm_jax.samplers.filters import NOT_FINITE
from mdm_jax.types import Array, PyTree

_PACE = 0.03
"""Seconds that a state stays on a terminal, at least."""


class Watcher:
    """What is shown of rows in the making.

    ``live``: on standard output, texts alone. ``gif``: a path; "" for none. ``event_shape``: of a
    picture, where there is no tokenizer.
    """

    def __init__(
        self,
        codec: data.Tokenizer | None,
        mask_id: int,
        live: bool,
        gif: str,
        event_shape: tuple[int, ...] | None = None,
    ):
        if live and codec is None:
            raise ValueError("--live shows texts, but these data are pictures; take --gif=FILE")
        if gif:
            film.check_path(gif)
        self._codec, self._mask, self._shape = codec, mask_id, event_shape
        self._live, self._gif = live, gif
        self._screen, self._frames = Screen(sys.stdout), []
        self._canvas = self._documents = np.zeros((0, 0), np.int32)
        self._filmed = False

    def begin(self, canvas: np.ndarray, documents: np.ndarray) -> None:
        """Rows [B, L] are decoded next; only the first ones are filmed."""
        self._filmed = bool(self._frames)
        self._canvas, self._documents = canvas, documents
        if self._codec is not None:
            self.show(canvas)

    def show(self, tokens: np.ndarray) -> None:
        """Tokens [B, L] after a step; positions behind the block that is written are masked."""
        tokens = np.where(self._canvas == self._mask, tokens[: len(self._canvas)], self._canvas)
        tokens = np.where(tokens == NOT_FINITE, self._mask, tokens)  # said in the end
        if self._gif and not self._filmed:
            self._frames.append(tokens)
        if self._live:
            colour = in_colour(sys.stdout)
            self._screen.draw("\n\n".join(marked(text, colour) for text in self._texts(tokens)))
            if self._screen.is_terminal:
                time.sleep(_PACE)

    def end(self) -> None:
        """The last step is done; clears the terminal."""
        self._screen.clear()

    def write(self) -> list[str]:
        """Write the film of the first rows; returns its path, if one was asked for."""
        if not self._gif:
            return []
        frames = film.thinned(self._frames)
        if self._codec is None:
            film.write_pictures(self._gif, [self._pictures(frame) for frame in frames])
        else:
            film.write_texts(self._gif, [self._texts(f)[: film.MOST_TEXTS] for f in frames])
        return [self._gif]

    def _texts(self, tokens: np.ndarray) -> list[list[str]]:
        rows = zip(tokens, self._canvas == self._mask, self._documents > 0)
        return [parts(self._codec, row[seen], made[seen]) for row, made, seen in rows]

    def _pictures(self, tokens: np.ndarray) -> np.ndarray:
        top = self._mask - 1
        values = np.where(tokens > top, np.nan, tokens / top)
        return values.reshape(len(tokens), *self._shape)[: film.MOST_PICTURES]


def in_batches(
    generate: Callable[..., np.ndarray], size: int, watcher: Watcher | None
) -> Callable[..., np.ndarray]:
    """``generate`` for any number of rows, ``size`` at a time, each as if alone; watched."""

    def run(params: PyTree, key: Array, canvas: np.ndarray, documents: np.ndarray) -> np.ndarray:
        made: list[Any] = []
        for start in range(0, len(canvas), size):
            own = canvas[start : start + size], documents[start : start + size]
            count = len(own[0])
            if len(canvas) > size:  # all batches in one program
                own = tuple(_filled(values, size) for values in own)
            if watcher is not None:
                watcher.begin(own[0][:count], own[1][:count])
            tokens = generate(params, key, *own, start)
            jax.effects_barrier()
            if watcher is not None:
                watcher.end()
            made.append(tokens[:count])
        return np.concatenate(made)

    return run


def _filled(values: np.ndarray, size: int) -> np.ndarray:
    last: Sequence[np.ndarray] = [values[-1:]] * (size - len(values))
    return np.concatenate([values, *last])
