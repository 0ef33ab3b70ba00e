"""Problems of tasks as JSON lines: puzzle banks, and generated ones made ahead by all cores."""

import json
import multiprocessing
import pathlib
import re
import runpy
from collections.abc import Iterable, Iterator

from mdm_jax import tasks
from mdm_jax.data.records import read_text
from mdm_jax.launch import build

_CHUNK = 256
_GRID = re.compile("[0-9.]{81}")


def sudoku(source: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Puzzles and solutions of a file with both on a line, in the first two of its columns.

    Columns end at commas or spaces; a head line is skipped; blanks are 0 or a full stop. So it
    reads the comma-separated files of one million puzzles (columns quizzes, solutions) and the bank
    with ratings. ValueError names a line that is no puzzle and the number of the first.
    """
    if not source.exists():
        raise ValueError(f"{source}: no such file; give one with a puzzle and its solution a line")
    task = tasks.Sudoku(3, 3, (1, 64))
    for number, line in enumerate(read_text(source).content.splitlines(), start=1):
        found = re.split("[, ]+", line.strip())[:2]
        puzzle, solution = (found[0].replace(".", "0"), found[-1])
        if len(found) != 2 or not all(map(_GRID.fullmatch, found)):
            if number == 1:
                continue
            raise ValueError(f"{source}:{number}: no puzzle and solution of 81 digits: {line!r}")
        if not task.check(puzzle, solution):
            raise ValueError(f"{source}:{number}: the solution is not one of the puzzle")
        yield puzzle, solution


def mawps(source: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Word problems of MAWPS (splits train and valid) with their equation and, after ####, result.

    ``How many flowers do 3 and 5 make ?`` to ``3 + 5 #### 8``, with brackets around inner
    operations, from JSON lines with question, numbers, equation in prefix form, answer and split.
    ValueError for a line without these.
    """
    if not source.exists():
        raise ValueError(f"{source}: no such file; give JSON lines of MAWPS with slots for numbers")
    for number, line in enumerate(read_text(source).content.splitlines(), start=1):
        try:
            record = json.loads(line)
            if record["split"] not in ("train", "valid"):
                continue  # SVAMP
            values = [_plain(value) for value in record["numbers"]]
            words = [_filled(word, values) for word in record["question"].split()]
            equation = [_filled(word, values) for word in record["equation"].split()]
            answer = f"{_infix(equation)} #### {_plain(round(record['answer'], 4))}"
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(f"{source}:{number}: no problem of MAWPS ({error!r})") from error
        yield " ".join(words) + "\n", answer


def _plain(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _filled(word: str, values: list[str]) -> str:
    slot = re.fullmatch(r"number(\d+)", word)
    return values[int(slot[1])] if slot else word


def _infix(prefix: list[str]) -> str:
    """An equation in prefix form; ValueError where words are left over."""

    def read(start: int, outer: bool) -> tuple[str, int]:
        if prefix[start] not in "+-*/":
            return prefix[start], start + 1
        left, middle = read(start + 1, outer=False)
        right, end = read(middle, outer=False)
        text = f"{left} {prefix[start]} {right}"
        return text if outer else f"( {text} )", end

    text, end = read(0, outer=True)
    if end != len(prefix):
        raise ValueError(f"{' '.join(prefix)} is no equation in prefix form")
    return text


def generated(config: str, split: str, processes: int | None = None) -> Iterator[tuple[str, str]]:
    """The rows of a split of a config with generated problems, made by ``processes`` (None: all).

    ValueError for a config of other data.
    """
    file, _, variant = config.partition(":")
    get_config = runpy.run_path(file)["get_config"]
    source = getattr(build.dataset(get_config(variant)), split)
    if not isinstance(source, tasks.TaskRows):
        raise ValueError(f"{config}: its data are not generated (data.source='task')")
    jobs = [
        (source.task, split, start, min(start + _CHUNK, len(source)))
        for start in range(0, len(source), _CHUNK)
    ]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for part in pool.imap(_examples, jobs):
            yield from part


def _examples(job: tuple[tasks.Task, str, int, int]) -> list[tuple[str, str]]:
    task, split, start, stop = job
    return [tuple(tasks.example(task, split, i)) for i in range(start, stop)]


def write_pairs(pairs: Iterable[tuple[str, str]], path: pathlib.Path) -> int:
    """Write JSON lines of prompts and answers; returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    count = 0
    with partial.open("w", encoding="utf-8") as file:
        for prompt, answer in pairs:
            file.write(json.dumps({"prompt": prompt, "answer": answer}) + "\n")
            count += 1
    partial.rename(path)
    return count
