"""Prepare the data of a benchmark from local files.

python -m experiments.prepare text8 --source=text8.zip --to=data/text8.txt
python -m experiments.prepare letters --source=NOVELS.txt --to=data/letters.txt
python -m experiments.prepare lm1b --source=FOLDER --to=data/lm1b
python -m experiments.prepare openwebtext --source=FOLDER --to=data/openwebtext
python -m experiments.prepare pictures --source=PICTURES.npz.xz --to=data/my_pictures
python -m experiments.prepare sudoku --source=PUZZLES.csv --to=data/sudoku.jsonl
python -m experiments.prepare mawps --source=mawps_svamp.jsonl.xz --to=data/mawps.jsonl
python -m experiments.prepare generate --config=CONFIG --split=train --to=data/zebra.jsonl
"""

import argparse
import pathlib
import sys

from experiments.prepare import corpora, pictures, puzzles


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        print(arguments.run(arguments))
    except (ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m experiments.prepare", description="Data of the benchmarks from local files."
    )
    commands = parser.add_subparsers(required=True)
    for name, run, meaning in (
        ("text8", _text8, "text8.zip, or the file in it"),
        ("letters", _letters, "texts or JSON lines, reduced to the 27 letters of text8"),
        ("lm1b", _lm1b, "the unpacked folder of LM1B"),
        ("openwebtext", _openwebtext, "a folder of OpenWebText"),
        ("pictures", _pictures, "arrays SPLIT_images and SPLIT_labels in an .npz or .npz.xz"),
        ("sudoku", _sudoku, "a puzzle and its solution a line"),
        ("mawps", _mawps, "JSON lines of MAWPS, questions with slots for numbers"),
    ):
        own = commands.add_parser(name, help=meaning)
        several = {"nargs": "+"} if name == "letters" else {}
        own.add_argument("--source", type=pathlib.Path, required=True, help=meaning, **several)
        own.add_argument("--to", type=pathlib.Path, required=True, help="where the data go")
        own.set_defaults(run=run)
    own = commands.add_parser("generate", help="problems of a config, made by all cores")
    own.add_argument("--config", required=True, help="file of a config, with :VARIANT if any")
    own.add_argument("--split", default="train", choices=("train", "valid", "test"))
    own.add_argument("--to", type=pathlib.Path, required=True, help="JSON lines to write")
    own.set_defaults(run=_generate)
    return parser


def _text8(arguments: argparse.Namespace) -> str:
    return _write_text(corpora.text8(arguments.source), arguments.to)


def _letters(arguments: argparse.Namespace) -> str:
    text, count = corpora.letters(arguments.source)
    return f"{count} texts; {_write_text(text, arguments.to)}"


def _write_text(text: str, path: pathlib.Path) -> str:
    corpora.refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "ascii")
    return f"wrote {path}, {len(text):,} characters"


def _lm1b(arguments: argparse.Namespace) -> str:
    return f"wrote {corpora.write_documents(corpora.lm1b(arguments.source), arguments.to)}"


def _openwebtext(arguments: argparse.Namespace) -> str:
    return f"wrote {corpora.write_documents(corpora.openwebtext(arguments.source), arguments.to)}"


def _pictures(arguments: argparse.Namespace) -> str:
    found = pictures.read(arguments.source)
    counts = ", ".join(f"{len(labels):,} {split}" for split, (_, labels) in found.items())
    written = pictures.write(found, arguments.to)
    return (
        f"wrote {written}, pictures: {counts}; read by --config.data.name={arguments.to.name} "
        f"--config.data.data_dir={arguments.to.parent}"
    )


def _sudoku(arguments: argparse.Namespace) -> str:
    corpora.refuse_existing(arguments.to)
    count = puzzles.write_pairs(puzzles.sudoku(arguments.source), arguments.to)
    return f"wrote {arguments.to}, {count:,} puzzles"


def _mawps(arguments: argparse.Namespace) -> str:
    corpora.refuse_existing(arguments.to)
    count = puzzles.write_pairs(puzzles.mawps(arguments.source), arguments.to)
    return f"wrote {arguments.to}, {count:,} problems"


def _generate(arguments: argparse.Namespace) -> str:
    corpora.refuse_existing(arguments.to)
    pairs = puzzles.generated(arguments.config, arguments.split)
    return f"wrote {arguments.to}, {puzzles.write_pairs(pairs, arguments.to):,} problems"


if __name__ == "__main__":
    raise SystemExit(main())
