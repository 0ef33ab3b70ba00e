"""The mode ``new``: a config for a file of one's own, with the reason of every choice."""

import importlib.util
import json
import pathlib
import textwrap
from collections.abc import Callable, Sequence

from absl import flags

from mdm_jax.data.statistics import length_table
from mdm_jax.launch.start import plan, trial
from mdm_jax.launch.start.look import KINDS, Look, look, name_of
from mdm_jax.launch.start.plan import Choice, Machine

MEMORY_SHARE = 0.7
"""Of a device's memory, that a step may take."""
_PATH = flags.DEFINE_string("path", "", "new: the file that a config is written for.")
_OUT = flags.DEFINE_string("out", "", "new: the config file, by default FILE_config.py.")
_MINUTES = flags.DEFINE_float("minutes", 10.0, "new: time to train for.", 0.0)
_FIELDS = flags.DEFINE_list("fields", [], "new: keys of its rows, else the usual names.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "new: write over --out.")

TRAINING_SHARE = 0.85
"""Of the budget: the rest is for compiling, validations and checkpoints."""


def run(kinds: Sequence[str], show: Callable[[str], None]) -> None:
    """:func:`new` with the flags of the command line."""
    new(
        " ".join(kinds),
        _PATH.value,
        _OUT.value,
        _MINUTES.value,
        fields=_FIELDS.value,
        overwrite=_OVERWRITE.value,
        show=show,
    )


def new(
    kind: str,
    path: str,
    out: str,
    minutes: float,
    fields: Sequence[str] = (),
    overwrite: bool = False,
    show: Callable[[str], None] = print,
) -> pathlib.Path:
    """Look at a file, measure a few steps, write a config that trains for ``minutes``.

    ValueError for an unknown kind or a file that is there and not to be overwritten, and as
    reading, building and measuring raise them.
    """
    if kind not in KINDS:
        raise ValueError(f"mdm new {kind or 'KIND'}: KIND is one of {', '.join(KINDS)}")
    if not path:
        raise ValueError(f"mdm new {kind} needs --path=FILE")
    target = pathlib.Path(out or f"{name_of(path)}_config.py")
    if target.suffix != ".py":
        raise ValueError(f"--out={out}: the config is a Python file; name it *.py")
    if not target.parent.is_dir():
        raise ValueError(f"--out={out}: there is no directory {target.parent}; make it first")
    if target.exists() and not overwrite:
        raise ValueError(f"{target} is there already; name another --out, or pass --overwrite")
    if minutes <= 0:
        raise ValueError(f"--minutes={minutes:g}: must be above 0")
    found, machine = look(kind, path, fields), plan.this_machine()
    show(f"{path}, read as {kind}:")
    show(textwrap.indent("\n".join(found.lines), "  "))
    show(f"machine: {machine.describe()}")
    choices, measured = _choose(found, machine, minutes, show)
    target.write_text(source(found, minutes, choices, measured), "utf-8")
    for choice in choices:
        names = ", ".join(f"{choice.section}.{k}={v!r}" for k, v in choice.settings.items())
        show(textwrap.fill(f"{names}: {choice.why}", 100, subsequent_indent="    "))
    show(f"written to {target}; train with")
    show(f"  mdm train --config={target} --workdir=runs/{target.stem}")
    return target


def _choose(
    found: Look, machine: Machine, minutes: float, show: Callable[[str], None]
) -> tuple[list[Choice], list[str]]:
    """All choices, and what was measured for them."""
    path = pathlib.Path(found.path)  # or a glob, or several
    settings = {"source": found.kind, "path": str(path.resolve() if path.exists() else path)}
    how = ", ".join(f"{k}={v!r}" for k, v in found.settings.items())
    choices = [
        Choice(
            "data",
            settings | dict(found.settings),
            f"{found.count:,} {found.items}" + f"; found in the rows: {how}" * bool(how),
        )
    ]
    if found.bad:
        why = f"{len(found.bad):,} rows are left out and counted, as {found.bad[0]}"
        choices.append(Choice("data", {"bad_rows": "drop"}, why))
    choices.append(plan.tokens(found, importlib.util.find_spec("tokenizers") is not None, machine))
    own = choices[-1].settings
    codec = found.tokenizer(own["tokenizer"], own.get("bpe_vocab_size", 0))
    sizes = found.lengths(codec)
    table = "\n".join(
        [
            f"lengths in tokens of {own['tokenizer']}, of which there are {codec.vocab_size:,}:",
            length_table(sizes),
        ]
    )
    show(table)
    choices += [*plan.lengths(found, sizes, machine), *plan.splits(found), plan.batch(machine)]
    rows = choices[-1].settings["batch_size"]
    lines = [machine.describe(), *table.splitlines()]

    def measure(size: tuple[int, int]) -> trial.Trial:
        show(f"measuring a network of width {size[0]} and depth {size[1]} ...")
        tried = [*choices, plan.network(size, machine, ""), Choice("train", {"steps": 1000}, "")]
        tried.append(plan.sampling(found, 32))
        result = trial.measure(plan.apply(tried), seconds=min(10, 3 * minutes))
        line = (
            f"width {size[0]}, depth {size[1]}: {result.step:.3g} s a step (median of "
            f"{result.steps}, the slowest {result.slowest:.3g}), "
            f"{result.compiling:.0f} s to compile"
        )
        if result.memory_bytes is not None:
            line += f", {result.memory_bytes / 2**20:,.0f} MiB a device"
        show(f"  {line}")
        lines.append(f"measured: {line}")
        return result

    first = (96, 3) if machine.is_cpu else (512, 8)
    seconds = 60 * minutes * TRAINING_SHARE
    while True:
        try:
            result = measure(first)
            break
        except MemoryError:
            if first == plan.SIZES[0]:
                raise
            show("  which does not fit in the memory of a device")
            first = plan.SIZES[plan.SIZES.index(first) - 1]
    row = (rows, result.length, result.vocab_size)
    size, _ = plan.fitting_size(seconds, result.step, first, row)
    if size != first:
        result = measure(size)
    while (result.memory_bytes or 0) > MEMORY_SHARE * machine.memory and size != plan.SIZES[0]:
        size = plan.SIZES[plan.SIZES.index(size) - 1]
        result = measure(size)
    steps = max(10, int(seconds / result.step))
    seen = steps * rows * result.length
    count = plan.parameters(*size)
    why = (
        f"{count:,} parameters in blocks: {steps:,} steps see {seen:,} tokens, "
        f"{seen / count:.0f} a parameter (the aim is {plan.TOKENS_PER_PARAMETER})"
    )
    choices.append(plan.network(size, machine, why))
    choices.append(
        Choice(
            "optimizer",
            {"name": "muon"},
            "peak, warm-up and average follow from it and train.steps (mdm config base optimizer)",
        )
    )
    visits = steps * rows / max(1, result.training_rows)
    if found.kind == "text":  # windows overlap
        visits = seen / max(1, sum(map(len, map(codec.encode, found.texts))))
    why = (
        f"{minutes:g} minutes, of which {TRAINING_SHARE:.0%} are steps of {result.step:.3g} s as "
        f"measured when this was written; every token is seen {visits:.1f} times"
    )
    if visits > 100:
        why += "; so often that validation may get worse: watch it, or set train.stop.patience"
    choices.append(Choice("train", {"steps": steps}, why))
    passes = plan.apply(choices).evaluate
    affordable = int(0.1 * steps * rows * 3 / (10 * passes.passes * passes.replicates))
    choices += plan.schedule(steps, rows, max(32, affordable))
    choices.append(plan.sampling(found, result.length))
    return choices, lines


def source(found: Look, minutes: float, choices: Sequence[Choice], lines: Sequence[str]) -> str:
    """The config as a Python file, with reasons as comments."""
    head = [
        f"{found.kind.capitalize()} of {pathlib.Path(found.path).name}, for {minutes:g} minutes on "
        "the machine at hand; written by mdm new.",
        "",
        "mdm train --config=THIS_FILE --workdir=runs/NAME",
        "",
        *(line for each in found.lines for line in each.splitlines()),
        "",
        *lines,
    ]
    text = "\n".join(_wrapped(line) for line in head).replace("\\", "\\\\").replace('"""', "'''")
    blocks = [
        f'"""{text}\n"""',
        "",
        "from mdm_jax.launch import config as defaults",
        "",
        "",
        "def get_config():",
        '    """Defaults are in mdm config base; what is changed has its reason."""',
        "    config = defaults.get_config()",
    ]
    for choice in choices:
        comment = textwrap.wrap(choice.why, 94, break_long_words=False)
        blocks += [f"    # {_printable(line)}" for line in comment]
        blocks += [f"    {line}" for line in _update(choice)]
    return "\n".join([*blocks, "    return config", ""])


def _update(choice: Choice) -> list[str]:
    """A call that sets the settings of a choice, in lines of at most 100 characters."""
    given = [
        # In double quotes where JSON and Python agree, which they do not on pairs of surrogates.
        f"{name}={json.dumps(value) if isinstance(value, str) and value.isascii() else repr(value)}"
        for name, value in choice.settings.items()
    ]
    line = f"config.{choice.section}.update({', '.join(given)})"
    if len(line) <= 96:
        return [line]
    return [f"config.{choice.section}.update(", *(f"    {each}," for each in given), ")"]


def _wrapped(line: str) -> str:
    indent = line[: len(line) - len(line.lstrip())]
    return _printable(textwrap.fill(line, 98, subsequent_indent=indent + "  ")) if line else ""


def _printable(text: str) -> str:
    """Printable text of one line, for a comment."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)
