"""The command line that all benchmarks share, and how their records are printed and kept."""

import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import app, flags, logging

from experiments.benchmarks import machine
from experiments.benchmarks.shapes import SHAPES, Shape

_SHAPES = flags.DEFINE_list("shapes", ["S", "M"], "Which of S, M and L; L needs an accelerator.")
_VARIANTS = flags.DEFINE_list("variants", ["default"], "Names, or the sets 'default' and 'all'.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Fewest rounds of each comparison.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 20.0, "Rounds go on so long per comparison.")
_BATCH = flags.DEFINE_integer("batch_size", None, "Training rows in place of the shape's own.")
_OUT = flags.DEFINE_string("out", None, "Where to write the figures as JSON.")


class Options(NamedTuple):
    """What a benchmark is told.

    Attributes:
        variants: names, or the names of sets of variants.
        rounds: fewest rounds of a comparison.
        seconds: how long its rounds go on.
    """

    variants: Sequence[str] = ("default",)
    rounds: int = 3
    seconds: float = 20.0


class Part(NamedTuple):
    """One benchmark.

    Attributes:
        name: that of its module.
        measure: ``measure(shape, options) -> record`` of JSON values.
        table: ``table(record) -> lines`` in Markdown.
    """

    name: str
    measure: Callable[[Shape, Options], dict[str, Any]]
    table: Callable[[dict[str, Any]], list[str]]


def main(*parts: Part) -> None:
    """Runs benchmarks with the flags of the command line; does not return."""
    app.run(lambda _: _run(parts))


def choose(
    table: Mapping[str, Any], names: Iterable[str], sets: Mapping[str, Iterable[str]]
) -> dict[str, Any]:
    """Entries of a table of variants by name or by the name of a set, in the table's order.

    Raises:
        ValueError: for a name that is neither.
    """
    wanted: set[str] = set()
    for name in names:
        if name not in sets and name not in table:
            raise ValueError(
                f"--variants: unknown {name!r}; known are {', '.join(table)} and the sets "
                f"{', '.join(sets)}"
            )
        wanted |= set(sets.get(name, (name,)))
    return {name: entry for name, entry in table.items() if name in wanted}


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns are aligned, so that it reads well as plain text too."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return [line(cells[0]), line(rule), *map(line, cells[1:])]


def spread(figures: Mapping[str, float], digits: int = 2) -> str:
    """A median with its quartiles, as in ``1.70 (1.66-1.75)``."""
    low, high = figures["lower_quartile"], figures["upper_quartile"]
    return f"{figures['median']:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def why(error: Exception) -> str:
    """An error in one short line, for a variant that cannot be measured here."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:200]


def _run(parts: Sequence[Part]) -> None:
    unknown = set(_SHAPES.value) - set(SHAPES)
    if unknown:
        raise app.UsageError(f"--shapes: unknown {sorted(unknown)}; known are {list(SHAPES)}")
    logging.set_verbosity(logging.WARNING)
    options = Options(tuple(_VARIANTS.value), _ROUNDS.value, _SECONDS.value)
    found = machine.facts()
    record: dict[str, Any] = {"machine": found, "options": options._asdict(), "parts": {}}
    print(machine.describe(found), flush=True)
    for part in parts:
        for name in _SHAPES.value:
            shape = SHAPES[name]
            if _BATCH.value is not None:
                shape = shape._replace(batch_size=_BATCH.value)
            print(f"\n## {part.name}, shape {name}\n", flush=True)
            if shape.needs_accelerator and found["platform"] == "cpu":
                result, lines = {"unavailable": "too large for a CPU"}, ["too large for a CPU"]
            else:
                result = part.measure(shape, options)
                lines = part.table(result)
            record["parts"].setdefault(part.name, {})[name] = {"shape": shape._asdict(), **result}
            print("\n".join(lines), flush=True)
            record["device_peak_bytes"] = machine.device_peak_bytes()
            if _OUT.value:  # after every table: an interrupted run keeps what it has
                text = json.dumps(record, indent=1) + "\n"
                path = pathlib.Path(_OUT.value)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, "utf-8")
