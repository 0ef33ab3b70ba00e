"""The one style of all plots: colours, line styles, labels, and files."""

import io
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mdm_jax import files

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")
"""Colours of Okabe and Ito (2008), told apart with any colour vision; yellow is left out as too
light for lines on white."""
GREY = "0.6"
"""Of what is drawn behind: single batches, paths."""
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\")
"""Of bars, which are told apart without colour too."""
_DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))


def line(number: int) -> dict[str, Any]:
    """Colour and dashes of series ``number``; 35 differ, and neighbours do in grey too."""
    return {
        "color": PALETTE[number % len(PALETTE)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "linewidth": 1.5,
    }


def bar(number: int) -> dict[str, Any]:
    """Colour and hatching of bars ``number``."""
    return {
        "color": PALETTE[number % len(PALETTE)],
        "hatch": HATCHES[number % len(HATCHES)],
        "edgecolor": "white",
    }


def dress(axes: Any, title: str, xlabel: str, ylabel: str = "", *, columns: int = 2) -> Any:
    """Give axes with their data drawn the style: title, labels, grid, and the legend below.

    The legend, of ``columns``, lists what has a label and covers no data. Returns the axes.
    """
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(which="both", labelsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if xlabel == "step":
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(visible=True, color="0.9", linewidth=0.8)
    if axes.get_legend_handles_labels()[1]:
        from matplotlib.transforms import ScaledTranslation

        # In inches below the axes: clear of the ticks and the label, whatever the figure's size.
        below = ScaledTranslation(0, -0.48, axes.figure.dpi_scale_trans)
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(0, 0),
            bbox_transform=axes.transAxes + below,
            borderaxespad=0,
            ncols=columns,
            fontsize=8.5,
            frameon=False,
        )
    return axes


def new_figure(size: tuple[float, float]) -> Any:
    """An empty matplotlib figure of ``size`` inches that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(draw: Callable[[Any], Any], path: str | os.PathLike, size: tuple[float, float]) -> None:
    """Write ``draw(axes)`` as a PNG of ``size`` inches, making directories."""
    figure = new_figure(size)
    draw(figure.add_subplot())
    write(figure, path)


def write(figure: Any, path: str | os.PathLike) -> None:
    """Write a figure as a PNG, making directories."""
    path, png = files.Path(path), io.BytesIO()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=120, format="png")
    files.write(path, png.getvalue())


def write_film(figures: Iterable[Any], path: str | os.PathLike) -> None:
    """Write figures of one size as an animated GIF of 32 colours, making directories.

    A frame is shown for a fifth of a second, the last for 2.5 s. ImportError without Pillow.
    """
    from PIL import Image

    pictures = []
    for figure in figures:
        figure.canvas.draw()
        picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
        pictures.append(picture)
    # One palette, of the last frame: what does not change is then stored once.
    palette = pictures[-1].quantize(32)
    pictures = [each.quantize(palette=palette, dither=Image.Dither.NONE) for each in pictures]
    path = files.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, gif(pictures, 200, 2500))


def gif(pictures: Sequence[Any], frame: int, last: int) -> bytes:
    """An endless animated GIF of Pillow's images, shown for ``frame`` and ``last`` milliseconds."""
    stream, (first, *rest) = io.BytesIO(), pictures
    times = [frame] * len(rest) + [last]
    first.save(stream, "GIF", save_all=True, append_images=rest, duration=times, loop=0)
    return stream.getvalue()


def svg(draw: Callable[[Any], Any], size: tuple[float, float], name: str) -> str:
    """``draw(axes)`` as an SVG element for a page of HTML, of ``size`` inches.

    It refers to nothing outside, its texts are text in the page's font, its ground is transparent.
    ``name`` tells its ids from those of other figures on the page.
    """
    import matplotlib

    image = io.StringIO()
    options = {"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": name}
    with matplotlib.rc_context(options):
        figure = new_figure(size)
        draw(figure.add_subplot())
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    text = image.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    return re.sub(r'(width|height)="[\d.]+pt" ', "", text, count=2)
