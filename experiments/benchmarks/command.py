"""The command line that all benchmarks share, interleaved timings, tables and JSON records."""

import json
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags, logging

from experiments.benchmarks import machine
from experiments.benchmarks.setting import SHAPES, Shape

_SHAPES = flags.DEFINE_list(
    "shapes", ["S", "M"], "Which of S, Q, V, W, M, L; L needs an accelerator."
)
_VARIANTS = flags.DEFINE_list("variants", ["default"], "Names, or the sets 'default' and 'all'.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Fewest rounds of each comparison.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 20.0, "Rounds go on so long per comparison.")
_PROCESSOR = flags.DEFINE_bool(
    "processor_seconds", False, "train_step: of the process's cores, for a machine that is busy."
)
_BATCH = flags.DEFINE_integer("batch_size", None, "Training rows in place of the shape's own.")
_OUT = flags.DEFINE_string(  # mdm new has one of this name, too
    "out", None, "Where to write the figures as JSON.", allow_override=True
)


class Options(NamedTuple):
    """Options of a benchmark: variants or sets of them, fewest rounds, and their duration.

    ``processor``: the seconds are those of the process's cores, not of a clock.
    """

    variants: Sequence[str] = ("default",)
    rounds: int = 3
    seconds: float = 20.0
    processor: bool = False


class Part(NamedTuple):
    """One benchmark, under the name of its module.

    ``measure(shape, options)`` returns a record of JSON values, ``table(record)`` its lines in
    Markdown.
    """

    name: str
    measure: Callable[[Shape, Options], dict[str, Any]]
    table: Callable[[dict[str, Any]], list[str]]


def main(*parts: Part) -> None:
    """Run benchmarks with the flags of the command line; does not return."""
    app.run(lambda _: run(parts))


def write(record: dict[str, Any]) -> None:
    """Write a record to ``--out``, where that is given."""
    if _OUT.value:
        path = pathlib.Path(_OUT.value)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def choose(
    table: Mapping[str, Any], names: Iterable[str], sets: Mapping[str, Iterable[str]]
) -> dict[str, Any]:
    """Entries of a table by name or by the name of a set, in the table's order.

    Raises:
        ValueError: for a name that is neither.
    """
    selected: set[str] = set()
    for name in names:
        if name not in sets and name not in table:
            raise ValueError(
                f"--variants: unknown {name!r}; known are {', '.join(table)} and the sets "
                f"{', '.join(sets)}"
            )
        selected |= set(sets.get(name, (name,)))
    return {name: entry for name, entry in table.items() if name in selected}


def build_each(
    table: Mapping[str, Any], build: Callable[[str, Any], Any]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """``build(name, entry)`` of every entry that this machine and these versions can build.

    Returns:
        What was built, and a record for every entry: its summary, and the error of the others as
        "unavailable" (out of memory included).
    """
    built, records = {}, {}
    for name, entry in table.items():
        records[name] = {"summary": entry.summary}
        try:
            built[name] = build(name, entry)
        except Exception as error:
            records[name]["unavailable"] = why(error)
    return built, records


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call in rounds of all, so that disturbances slow all of them down.

    The order of a round is random, from a fixed seed: no call always follows the same other one.
    Calls must block until their result is ready, and be compiled already. There are at least
    ``rounds`` rounds, and more until ``seconds`` are spent. ``clock`` is what is read before and
    after a call, such as ``time.process_time``.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin, done, names = time.perf_counter(), 0, list(calls)
    orders = np.random.default_rng(0)
    while done < rounds or (calls and time.perf_counter() - begin < seconds):
        for index in orders.permutation(len(names)):
            start = clock()
            calls[names[index]]()
            times[names[index]].append(clock() - start)
        done += 1
    return times


def summary(values: list[float]) -> dict[str, float]:
    """Median, quartiles, least and number of some measurements."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {
        "median": float(median),
        "lower_quartile": float(low),
        "upper_quartile": float(high),
        "least": float(np.min(values)),
        "count": len(values),
    }


def ratios(reference: list[float], values: list[float]) -> dict[str, float]:
    """Summary of ``reference / values`` round by round: the speed over the reference."""
    return summary([r / v for r, v in zip(reference, values, strict=True)])


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns are aligned, so that it reads well as plain text too."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return [line(cells[0]), line(rule), *map(line, cells[1:])]


def record_table(
    header: Sequence[str],
    records: Mapping[str, dict[str, Any]],
    row: Callable[[str, dict[str, Any]], Sequence[str]],
) -> list[str]:
    """Table of the records that were measured, and a line for each of the others."""
    measured = {name: record for name, record in records.items() if "unavailable" not in record}
    missing = [
        f"{name}: not measured, {record['unavailable']}"
        for name, record in records.items()
        if "unavailable" in record
    ]
    return [*markdown(header, [row(*item) for item in measured.items()]), *missing]


def spread(figures: Mapping[str, float] | None, digits: int = 2) -> str:
    """A median with its quartiles, as in ``1.70 (1.66-1.75)``; "-" for None."""
    if figures is None:
        return "-"
    low, high = figures["lower_quartile"], figures["upper_quartile"]
    return f"{figures['median']:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def why(error: Exception) -> str:
    """An error in one short line, for a variant that cannot be measured here."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:200]


def run(parts: Sequence[Part]) -> None:
    """Run benchmarks with the flags of the command line, which are parsed already."""
    unknown = set(_SHAPES.value) - set(SHAPES)
    if unknown:
        raise app.UsageError(f"--shapes: unknown {sorted(unknown)}; known are {list(SHAPES)}")
    logging.set_verbosity(logging.WARNING)
    options = Options(tuple(_VARIANTS.value), _ROUNDS.value, _SECONDS.value, _PROCESSOR.value)
    facts = machine.facts()
    record: dict[str, Any] = {"machine": facts, "options": options._asdict(), "parts": {}}
    print(machine.describe(facts), flush=True)
    for part in parts:
        for name in _SHAPES.value:
            shape = SHAPES[name]
            if _BATCH.value is not None:
                shape = shape._replace(batch_size=_BATCH.value)
            print(f"\n## {part.name}, shape {name}\n", flush=True)
            if shape.needs_accelerator and facts["platform"] == "cpu":
                result, lines = {"unavailable": "too large for a CPU"}, ["too large for a CPU"]
            else:
                result = part.measure(shape, options)
                lines = part.table(result)
            record["parts"].setdefault(part.name, {})[name] = {"shape": shape._asdict(), **result}
            print("\n".join(lines), flush=True)
            record["device_peak_bytes"] = machine.device_peak_bytes()
            write(record)  # after every table: an interrupted run keeps what it has
