"""Run the notebooks as Jupyter does, and store small outputs: texts and figures.

python -m experiments.notebooks                  # all; minutes each
python -m experiments.notebooks variance         # some of them
"""

import argparse
import base64
import io
import os
import pathlib
import tempfile
from collections.abc import Mapping

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.ipynb")))
KEPT = ("text/plain", "text/markdown", "image/png")
"""Kinds of output that are stored."""
DPI = 64
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(
    name: str,
    folder: pathlib.Path = FOLDER,
    variables: Mapping[str, str] | None = None,
    replaced: Mapping[str, str] | None = None,
) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run in ``folder``, by a kernel of this Python.

    ``variables`` are added to the environment, ``replaced`` are texts in place of others in its
    code. CellExecutionError, which shows the cell, at the first error.
    """
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        for old, new in (replaced or {}).items() if cell.cell_type == "code" else ():
            cell.source = cell.source.replace(old, new)
    with tempfile.TemporaryDirectory() as settings:
        pathlib.Path(settings, "matplotlibrc").write_text(f"figure.dpi: {DPI}\n", "utf-8")
        environment = {**os.environ, "MATPLOTLIBRC": settings, **(variables or {})}
        environment["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
        client = NotebookClient(
            notebook,
            timeout=1200,
            record_timing=False,
            resources={"metadata": {"path": str(folder)}},
        )
        client.execute(env=environment)
    return notebook


def stored(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook as it is kept: progress, which goes to stderr, is left out."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type != "code":
            continue
        outputs = []
        for output in cell.outputs:
            if output.output_type == "stream":
                if output.name == "stdout":
                    outputs.append(output)
                continue
            output.data = {kind: output.data[kind] for kind in KEPT if kind in output.data}
            if "image/png" in output.data:
                output.data["image/png"] = small(output.data["image/png"])
            output.metadata = {}
            if "image/png" in output.data or "text/markdown" in output.data:
                output.data.pop("text/plain", None)  # says only of which class it is
            outputs.append(output)
        cell.outputs = outputs
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def small(png: str) -> str:
    """A PNG, in base64 as the one given, of at most 64 colours."""
    data = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(data, "PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode()


def text_of(notebook: nbformat.NotebookNode) -> str:
    """What the cells printed, stderr too."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    for name in parser.parse_args().names or NAMES:
        path = FOLDER / f"{name}.ipynb"
        nbformat.write(stored(execute(name)), path)
        print(f"{name}: {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
