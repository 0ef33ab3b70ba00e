"""The decoding of texts or pictures as it happens: frames of an animated GIF."""

import itertools
import pathlib
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from mdm_jax import files, plots

MOST_TEXTS, MOST_PICTURES = 6, 25
"""Rows that a film shows."""
_MOST_FRAMES = 100
_FRAME, _LAST = 80, 2500  # milliseconds
_COLUMNS, _SIZE, _MARGIN = 72, 15, 8  # characters; pixels
_GIVEN, _MADE, _MASKED, _PAPER = "#222222", "#0072b2", "#c4c4c4", "#ffffff"
_PIXELS = 320  # width of pictures


def check_path(path: str, flag: str = "--gif") -> None:
    """Raise ValueError for a path that no new GIF can be written to; nothing is overwritten."""
    place = files.Path(path)
    if place.suffix.lower() != ".gif":
        raise ValueError(f"{flag}={path}: name a file that ends in .gif")
    if place.exists():
        raise ValueError(f"{flag}={path} exists; name a new file, or remove it")
    if not place.parent.is_dir():
        raise ValueError(f"{flag}={path}: there is no directory {place.parent}; make it first")
    _pillow()


def thinned(frames: Sequence[Any]) -> list[Any]:
    """At most a hundred of the frames, evenly spaced, with the first and the last."""
    chosen = np.linspace(0, len(frames) - 1, min(len(frames), _MOST_FRAMES)).round().astype(int)
    return [frames[i] for i in chosen]


def write_texts(path: str, frames: Sequence[Sequence[Sequence[str]]]) -> None:
    """Write a GIF of frames, each of texts, each of parts (``marks.parts``): generated in blue."""
    image, draw, font = _pillow()
    face = font.truetype(_font_file(), _SIZE)
    width, height = round(face.getlength("m")), round(1.4 * _SIZE)
    laid_out = [[_cells(parts) for parts in texts] for texts in frames]
    lines = np.max([[rows for _, rows in texts] for texts in laid_out], axis=0)
    tops = [0, *itertools.accumulate(int(n) + 1 for n in lines)]
    size = (_COLUMNS * width + 2 * _MARGIN, (tops[-1] - 1) * height + 2 * _MARGIN)
    palette = _palette(image, (_GIVEN, _MADE, _MASKED))
    pictures = []
    for texts in laid_out:
        picture = image.new("RGB", size, _PAPER)
        pen = draw.Draw(picture)
        for top, (cells, _) in zip(tops, texts):
            for character, colour, row, column in cells:
                place = (_MARGIN + column * width, _MARGIN + (top + row) * height)
                pen.text(place, character, colour, face)
        pictures.append(picture.quantize(palette=palette, dither=image.Dither.NONE))
    _write(path, pictures)


def write_pictures(path: str, frames: Sequence[np.ndarray]) -> None:
    """Write a GIF of frames [N, H, W] or [N, H, W, C] in [0, 1], NaN where masked (blue)."""
    image, _, _ = _pillow()
    grids = [plots.picture_grid(np.nan_to_num(frame)) for frame in frames]
    masks = [plots.picture_grid(np.where(np.isnan(frame), 1.0, 0.0)) == 1 for frame in frames]
    blue = _rgb(_MADE).astype(np.uint8)
    pictures = []
    for grid, mask in zip(grids, masks):
        shade = np.round(255 * np.clip(grid, 0, 1)).astype(np.uint8)
        shade = shade if shade.ndim == 3 and shade.shape[2] == 3 else _grey(shade)
        mask = mask if mask.ndim == 2 else mask.any(axis=-1)
        picture = image.fromarray(np.where(mask[..., None], blue, shade))
        factor = max(1, _PIXELS // picture.width)
        size = (picture.width * factor, picture.height * factor)
        pictures.append(picture.resize(size, image.Resampling.NEAREST))
    _write(path, pictures)


def _rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])


def _grey(shade: np.ndarray) -> np.ndarray:
    return np.repeat(shade.reshape(*shade.shape[:2], 1), 3, axis=2)


def _cells(parts: Sequence[str]) -> tuple[list[tuple[str, str, int, int]], int]:
    """Character, colour, line and column of a text in lines of a fixed width; its lines."""
    cells, row, column = [], 0, 0
    for number, part in enumerate(parts):
        for character in part:
            wide = 1 + (unicodedata.east_asian_width(character) in "WF")
            if character == "\n" or column + wide > _COLUMNS:
                row, column = row + 1, 0
            if character == "\n":
                continue
            colour = (_MASKED if character == "▁" else _MADE) if number % 2 else _GIVEN
            if not character.isspace():
                cells.append((character, colour, row, column))
            column += wide
    return cells, row + 1


def _palette(image: Any, colours: Sequence[str]) -> Any:
    """Colours and their blends with white, for edges of letters."""
    values = []
    for colour in colours:
        own = _rgb(colour)
        values += [own + (255 - own) * share for share in np.linspace(0, 1, 6)]
    palette = image.new("P", (1, 1))
    palette.putpalette(np.concatenate(values).round().astype(int).tolist())
    return palette


def _write(path: str, pictures: Sequence[Any]) -> None:
    content = plots.gif(pictures, _FRAME, _LAST)
    files.create(path)  # FileExistsError if somebody took the name
    files.write(path, content)


def _font_file() -> pathlib.Path:
    """A font of one width for all letters, which comes with matplotlib."""
    import matplotlib

    return pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf"


def _pillow() -> tuple[Any, Any, Any]:
    try:
        import matplotlib  # noqa: F401  its fonts
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        reason = "--gif needs matplotlib, which brings Pillow: pip install matplotlib"
        raise ImportError(reason) from error
    return Image, ImageDraw, ImageFont
