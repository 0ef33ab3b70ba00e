"""The mode ``sweep``: a list of training runs, one after the other, each in a process of its own.

A process gives back all its memory when it ends. This one starts no devices, which are the runs'.
Below the workdir: ``runs/NAME`` (a run's own workdir), ``logs/NAME.log``, ``sweep.json``,
``sweep.md``.
"""

import ast
import copy
import itertools
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import tqdm
from ml_collections import ConfigDict

from mdm_jax import files
from mdm_jax.evaluation.paired import unlike
from mdm_jax.evaluation.seeds import (
    format_difference,
    format_number,
    format_spread,
    markdown_table,
    summarise_seeds,
)
from mdm_jax.launch import config as launch_config
from mdm_jax.launch import source
from mdm_jax.launch.command_line import check_field, overridden
from mdm_jax.launch.start import scaled
from mdm_jax.launch.workdir import WorkdirError, check, provenance, read_config, writing
from mdm_jax.training.loop import Interrupt

STOPPED = 130
"""Exit status of a run that was stopped and saved."""
SCORES = {"bits_per_unit": False, "accuracy": True}
"""Fields of ``evaluation.json`` that are tabulated; whether higher is better."""
_PATIENCE = 0.25  # seconds between looks at a run


class Run(NamedTuple):
    """One run: its name, which is its directory, and the settings that it does not share."""

    name: str
    settings: Mapping[str, str]
    config: ConfigDict

    @property
    def seed(self) -> int:
        return int(self.config.seed)

    @property
    def group(self) -> str:
        """What it is averaged with, over seeds."""
        shared = {name: value for name, value in self.settings.items() if name != "seed"}
        return _label(shared) or "all runs"


def parse(over: str, flag: str = "--over") -> dict[str, list[str]]:
    """Values by setting of ``--over="seed=0,1,2;optimizer.peak=1e-3,3e-3"``, as written.

    Commas and semicolons inside brackets or quotes separate nothing. ValueError for what cannot be
    read, a setting given twice, or a value given twice; ``flag`` is what they name.
    """
    values: dict[str, list[str]] = {}
    for part in filter(str.strip, _split(over, ";")):
        name, equals, listed = (piece.strip() for piece in part.partition("="))
        given = [value.strip() for value in _split(listed, ",")]
        if not equals or not name or not all(given):
            raise ValueError(
                f"{flag}: {part.strip()!r} is not NAME=VALUE, or NAME=VALUE,VALUE for several, "
                "such as seed=0,1,2"
            )
        name = name.removeprefix("config.")
        if name in values or len(set(given)) < len(given):
            raise ValueError(f"{flag}: {name} has a value twice, or is named twice: {over!r}")
        values[name] = given
    if not values:
        raise ValueError(f'{flag} is required: as in {flag}="seed=0,1,2;optimizer.peak=1e-3,3e-3"')
    return values


def plan(config: ConfigDict, over: str, flag: str = "--over") -> list[Run]:
    """All combinations, seeds last, so that any prefix compares all other settings.

    ValueError or TypeError for a setting that does not exist or a value that it does not allow,
    which name the ``flag`` that ``over`` was given by.
    """
    values = parse(over, flag)
    for name in values:
        check_field(config, name)
    names = [name for name in values if name != "seed"]
    names = ["seed"] * ("seed" in values) + names  # the first one changes slowest
    runs: dict[str, Run] = {}
    for combination in itertools.product(*(values[name] for name in names)):
        chosen = dict(zip(names, combination))
        settings = {name: chosen[name] for name in values}  # named in the order given
        own = copy.deepcopy(config)
        for name, value in settings.items():
            _set(own, name, value, flag)
        launch_config.check_config(own)
        name = re.sub(r"[^\w.,=+-]+", "_", _label(settings))[:150]
        if name in runs:
            name = f"{name}-{len(runs)}"
        runs[name] = Run(name, settings, own)
    return list(runs.values())


def sweep(
    runs: Sequence[Run],
    workdir: files.Path,
    command: Sequence[str],
    show: Callable[[str], None] = print,
) -> int:
    """Train what is not finished, write the table; 0, 2 if a run failed, 130 if stopped.

    ``command`` trains one run, given ``--workdir`` and its settings. Finished runs are skipped,
    interrupted and failed ones go on from their last checkpoint. WorkdirError, before anything is
    started, if a run was made under another config.
    """
    _check(runs, workdir, overridden(["", *command]))
    failed: dict[str, str] = {}
    stopped = False
    waiting = [run for run in runs if not is_finished(workdir, run)]
    if done := len(runs) - len(waiting):
        show(f"{done} of {len(runs)} runs are finished already")
    with (
        Interrupt() as interrupt,
        tqdm.tqdm(total=len(runs), initial=done, unit="run", disable=None) as bar,
    ):
        for run in waiting:
            bar.set_postfix_str(run.name)
            code = _train(run, workdir, command, interrupt, bar)
            if interrupt.requested or code == STOPPED:
                stopped = True
                break
            text = f"{run.name}: {_result(workdir, run)}"
            if code:
                failed[run.name] = _reason(workdir, run, code)
                text = f"{run.name}: failed: {failed[run.name]}"
            bar.write(text, file=sys.stdout)
            bar.update(1)
            write(runs, workdir, failed)
    record = write(runs, workdir, failed)
    show(f"\n{record['markdown']}\nwritten to {workdir / 'sweep.md'} and {workdir / 'sweep.json'}")
    if stopped:
        return STOPPED
    return 2 if failed else 0


def is_finished(workdir: files.Path, run: Run) -> bool:
    """Whether the run has been trained and evaluated; the report is written last."""
    directory = _directory(workdir, run)
    if not (directory / "report.txt").exists():
        return False
    stored = read_config(directory)  # train.steps may have been raised since
    return stored is None or stored["train"]["steps"] >= run.config.train.steps


def write(
    runs: Sequence[Run], workdir: files.Path, failed: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write ``sweep.json`` and ``sweep.md`` from whatever is finished; returns the record."""
    failed = failed or {}
    rows, scores = [], {name: {} for name in SCORES}
    for run in runs:
        row = {"name": run.name, "group": run.group, "seed": run.seed, "settings": run.settings}
        row |= {"status": "waiting", "reason": failed.get(run.name, ""), "evaluation": None}
        if run.name in failed:
            row["status"] = "failed"
        elif is_finished(workdir, run):
            row["status"] = "finished"
            evaluation = files.read_json(_directory(workdir, run) / "evaluation.json")
            row["evaluation"] = {k: v for k, v in evaluation.items() if not isinstance(v, dict)}
            for name, by_group in scores.items():
                if evaluation.get(name) is not None:
                    by_group.setdefault(run.group, {})[run.seed] = evaluation[name]
        elif read_config(_directory(workdir, run)) is not None:
            row["status"] = "interrupted"
        rows.append(row)
    first = runs[0].group
    record = {
        "provenance": provenance(runs[0].seed),
        "baseline": first,
        "runs": rows,
        "scores": {
            name: summarise_seeds(by_group, first, SCORES[name])
            for name, by_group in scores.items()
            if by_group
        },
    }
    text = _markdown(record)
    with writing(workdir / "sweep.json"):
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_json(workdir / "sweep.json", record)
        files.write(workdir / "sweep.md", text)
    return record | {"markdown": text}


def _markdown(record: Mapping[str, Any]) -> str:
    counts = [row["status"] for row in record["runs"]]
    parts = [f"{counts.count('finished')} of {len(counts)} runs finished, means over seeds ± s.d."]
    head = ["settings", "seeds", "mean ± s.d.", "worst", f"against {record['baseline']} (95 %)"]
    head += ["p (Holm)"]
    for score, groups in record["scores"].items():
        rows = [
            [
                group,
                str(len(each["scores"])),
                format_spread(each),
                format_number(each["worst"]),
                format_difference(each["against_baseline"]),
                format_number(each["against_baseline"] and each["against_baseline"]["holm_p"]),
            ]
            for group, each in groups.items()
        ]
        better = "higher" if SCORES[score] else "lower"
        parts.append(f"{score} ({better} is better)\n\n{markdown_table(head, rows)}")
    lines = [
        f"* {row['name']}: {row['status']}{': ' * bool(row['reason'])}{row['reason']}"
        for row in record["runs"]
        if row["status"] != "finished"
    ]
    evaluations = {row["name"]: row["evaluation"] for row in record["runs"] if row["evaluation"]}
    lines += [f"* {line}" for line in unlike(evaluations)]
    return "\n\n".join([*parts, *["\n".join(lines)] * bool(lines)]) + "\n"


def _train(
    run: Run,
    workdir: files.Path,
    command: Sequence[str],
    interrupt: Interrupt,
    bar: Any,
) -> int:
    """One run to its end; a stop request is passed on once, and waited for."""
    directory, log = _directory(workdir, run), workdir / "logs" / f"{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    settings = [f"--config.{name}={value}" for name, value in run.settings.items()]
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*command, f"--workdir={directory}", *settings],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,  # a Ctrl-C reaches it once, from here
        )
        try:
            told = False
            while process.poll() is None:
                if interrupt.requested and not told:
                    process.send_signal(signal.SIGTERM)
                    told = True
                bar.set_postfix_str(f"{run.name} {_step(log)}".strip())
                time.sleep(_PATIENCE)
        except BaseException:
            process.kill()
            process.wait()
            raise
    return process.returncode


def _step(log: files.Path) -> str:
    """The end of a log, where training shows its step."""
    with log.open("rb") as file:
        file.seek(max(0, files.size(log) - 2000))
        found = re.findall(rb"step \d+/\d+ loss \S+", file.read())
    return found[-1].decode() if found else ""


def _result(workdir: files.Path, run: Run) -> str:
    path = _directory(workdir, run) / "evaluation.json"
    evaluation = files.read_json(path) if path.exists() else {}
    known = [
        f"{name} {evaluation[name]:.4f}" for name in SCORES if evaluation.get(name) is not None
    ]
    return ", ".join(known)


def _reason(workdir: files.Path, run: Run, code: int) -> str:
    """The last error in a run's log, or its exit status."""
    log = workdir / "logs" / f"{run.name}.log"
    lines = log.read_bytes().decode("utf-8", "replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else f"exit status {code}; see {log}"


def _check(runs: Sequence[Run], workdir: files.Path, shared: Sequence[str]) -> None:
    """Raise WorkdirError where the directory is another's, or a run has another config.

    ``shared``: settings that all runs are given.
    """
    if read_config(workdir) is not None:
        raise WorkdirError(f"{workdir} is a run of its own; name another --workdir for the sweep")
    others = [p for p in workdir.iterdir() if p.name not in _OWN] if workdir.is_dir() else []
    if others:
        raise WorkdirError(
            f"{workdir} holds {others[0].name}, which no sweep made; name a new directory"
        )
    for run in runs:
        directory, config = _directory(workdir, run), run.config
        if read_config(directory) is not None:  # which has what its source fixes, too
            model = source.read(config, directory)
            config = source.filled(config, model, {*shared, *run.settings}, directory)
            config = scaled.filled(config, read_config(directory))
        check(directory, config)


_OWN = ("runs", "logs", "sweep.json", "sweep.md")


def _directory(workdir: files.Path, run: Run) -> files.Path:
    return workdir / "runs" / run.name


def _label(settings: Mapping[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in settings.items())


def _split(text: str, separator: str) -> list[str]:
    """Parts of a text between separators that are in no brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == separator and not depth:
            parts.append("")
            continue
        parts[-1] += letter
    return parts


def _set(config: ConfigDict, name: str, text: str, flag: str) -> None:
    """Set a field from text, as the command line does; TypeError for another type."""
    *path, last = name.split(".")
    section = config
    for part in path:
        section = section[part]
    if isinstance(section[last], ConfigDict):
        raise ValueError(f"{flag}: {name} is a section; name one of {', '.join(section[last])}")
    value: Any = text
    if not isinstance(section[last], str):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(section[last], tuple) and not isinstance(value, tuple):
        value = (value,)
    try:
        section[last] = value
    except (TypeError, ValueError) as error:
        raise TypeError(f"{flag}: {name}={text}: {error}") from error
