"""Commands of README, docs and config headers: found in their text, and read by what they start."""

import ast
import functools
import importlib
import pathlib
import re
import shlex
from typing import NamedTuple

import launching
from absl import flags
from absl.testing import flagsaver

from mdm_jax.launch import command_line, main
from mdm_jax.launch import config as launch_config
from mdm_jax.launch.modes import eval_tasks, sweep
from mdm_jax.launch.start.look import KINDS

ROOT = launching.ROOT
PAGES = [
    *(
        "README.md",
        "CONTRIBUTING.md",
        "experiments/RESULTS.md",
        "experiments/benchmarks/RESULTS.md",
    ),
    "experiments/models/small/README.md",
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md")),
]
HEADERS = [
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("experiments/configs/**/*.py")),
    "mdm_jax/launch/presets.py",
]
FENCE = re.compile(r"^( *)```([\w.]*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`((?:mdm|python -m|make|pip install)\s[^`]+)`(?!`)")
SHELL = ("", "sh", "bash", "shell", "console")
PROGRAMS = ("mdm", "python", "make", "pip")
"""Programs whose command lines are checked."""
OTHERS = ("cd", "git", "gcloud", "hf", "export", "source", "tensorboard", "ls", "cat", "jupyter")
"""Programs of others, which may stand in a block of shell commands."""


class Command(NamedTuple):
    """Words of a command line and where it stands.

    ``quoted``: inside of a sentence; ``refused``: an error is shown as what it prints.
    """

    place: str
    words: tuple[str, ...]
    quoted: bool = False
    refused: bool = False


def of_page(page):
    """All commands of a Markdown file, in order."""
    text, found = (ROOT / page).read_text("utf-8"), []
    for match in FENCE.finditer(text):
        if match[2] in SHELL:
            line = text.count("\n", 0, match.start()) + 2
            found += of_block(match[3], page, line, labelled=bool(match[2]))
    prose = FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    for match in INLINE.finditer(prose):
        place = f"{page}:{prose.count(chr(10), 0, match.start()) + 1}"
        found.append(Command(place, words_of(match[1].replace("\n", " ")), quoted=True))
    return found


def of_header(file):
    """Commands of the docstrings of a Python file."""
    found = []
    for node in ast.walk(ast.parse((ROOT / file).read_text("utf-8"))):
        if isinstance(node, ast.Module | ast.FunctionDef):
            found += of_block(ast.get_docstring(node) or "", file, getattr(node, "lineno", 1))
    return found


def of_block(text, page, first, labelled=False):
    """Commands of a block; lines that begin with no program are what a command printed.

    In a block that is ``labelled`` as shell commands they are refused.
    """
    found, waiting = [], ""
    for number, line in enumerate(text.split("\n"), first):
        waiting += line
        if waiting.endswith("\\"):
            waiting = waiting[:-1] + " "
            continue
        try:
            words = words_of(waiting)
        except ValueError:  # within quotation marks
            if program(waiting.split()) in PROGRAMS:
                waiting += " "
                continue
            words = ()
        if program(words) in PROGRAMS:
            found.append(Command(f"{page}:{number}", words))
        elif found and line.startswith("error: "):
            found[-1] = found[-1]._replace(refused=True)
        elif labelled and words and program(words) not in OTHERS and not words[0].startswith("-"):
            raise AssertionError(f"{page}:{number}: no command that is known: {line}")
        waiting = ""
    return found


def words_of(line):
    """Words of a command line, what starts it in another way and where its output goes left out."""
    if match := re.search(r'--command="cd \S+ && (.*)"', line):
        line = match[1]
    words = shlex.split(line, comments=True)
    while words and (words[0] in ("nohup", "srun", "$") or re.match(r"[A-Z_]+=", words[0])):
        words = words[1:]
    ends = [i for i, word in enumerate(words) if word in (">", "&", "|", "&&", "<")]
    return tuple(word for word in words[: min(ends, default=None)] if word not in ("...", "…"))


def program(words):
    return pathlib.PurePath(words[0]).name if words else ""


def check(command):
    """Raise AssertionError, with the place, for what would be refused or find nothing."""
    try:
        CHECKS[program(command.words)](list(command.words[1:]))
    except (ValueError, TypeError, SystemExit) as error:
        raise AssertionError(f"{command.place}: {shlex.join(command.words)}\n{error}") from error


def check_mdm(words):
    """The launcher's own reading of its flags, and the checks that need no data."""
    words = [
        re.sub(r"^--config=(FILE|my_config\.py|\.\.\.)$", "--config=quickstart", word)
        for word in words
    ]
    words = [word.replace("=I", "=0") if word == "--process_id=I" else word for word in words]
    words = [word.replace(", NAME", ", mirror") for word in words]
    mode = words[0] if words and not words[0].startswith("-") else "train"
    named = mode == "config" or command_line.take_config(words)[0] is not None
    if mode in command_line.MODES and not named:
        words.append("--config=quickstart")  # stands for the config of the run
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        try:
            rest = main._parse(["mdm", *words])
            config = flags.FLAGS.config
            if rest[1:] and mode not in ("config", "new"):
                raise ValueError(f"no flags: {rest[1:]}")
            if mode == "new" and (rest[1:2] == [] or rest[1] not in KINDS):
                raise ValueError(f"mdm new of {rest[1:]}")
            for section in rest[1:] if mode == "config" else ():
                command_line.check_field(config, section)
            launch_config.check_config(config)
            if mode in main._MODEL_MODES:
                main._check_overrides()
            if mode == "sweep" and flags.FLAGS.over:
                sweep.plan(config, flags.FLAGS.over)
            if mode == "eval":
                eval_tasks.settings(flags.FLAGS.settings, {})
        except SystemExit as stop:
            if stop.code:
                raise ValueError("refused, see standard error") from stop
        finally:
            flags.FLAGS.mark_as_parsed()


def check_python(words):
    """``python -m MODULE``: the module is there and has the flags."""
    if words[:1] != ["-m"]:
        file = words[0] if words else ""
        if file.endswith(".py") and not (ROOT / file).is_file():
            raise ValueError(f"there is no file {file}")
        return None
    module, words = words[1], words[2:]
    if module in ("mdm_jax.launch", "experiments.launch"):
        return check_mdm(words)
    if module == "pip":
        return check_pip(words)
    if not module.startswith(("experiments", "mdm_jax")):
        return None
    known = flags_of(module)
    for word in (word.strip("[]") for word in words if word.strip("[]").startswith("-")):
        name, equals, value = word.lstrip("-").partition("=")
        if name.startswith("config."):
            command_line.check_field(launch_config.get_config(), name.removeprefix("config."))
        elif name not in known:
            raise ValueError(f"{module} has no flag --{name}; it has {', '.join(sorted(known))}")
        elif equals and known[name] is not None:
            known[name](value)
    return None


def check_make(words):
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for word in words:
        pattern = rf"^{re.escape(word.partition('=')[0])}( \?=|:)"
        if not re.search(pattern, makefile, re.MULTILINE):
            raise ValueError(f"the Makefile has no {word}")


def check_pip(words):
    extras = extras_of_setup()
    for word in words:
        match = re.search(r"(?:mdm_jax\S*|\.)\[([\w,]+)\]", word)
        if match and (unknown := {*match[1].split(",")} - extras):
            raise ValueError(f"no extra of setup.py: {unknown}")


CHECKS = {"mdm": check_mdm, "python": check_python, "make": check_make, "pip": check_pip}


@functools.cache
def extras_of_setup():
    tree = ast.parse((ROOT / "setup.py").read_text("utf-8"))
    (call,) = [
        n for n in ast.walk(tree) if isinstance(n, ast.keyword) and n.arg == "extras_require"
    ]
    return {key.value for key in call.value.keys}


@functools.cache
def flags_of(module):
    """Flag -> what reads its value, of a module and those of ours that it imports.

    From the source, since two programs may define one flag and some define theirs when started.
    """
    file = ROOT / (module.replace(".", "/") + ".py")
    if not file.is_file():
        file = file.with_suffix("") / "__main__.py"
    if not file.is_file():
        raise ValueError(f"there is no module {module}")
    tree, found, imported = ast.parse(file.read_text("utf-8")), {}, {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("experiments"):
            for name in node.names:
                imported[name.asname or name.name] = node.module
                if (ROOT / node.module.replace(".", "/") / f"{name.name}.py").is_file():
                    found |= flags_of(f"{node.module}.{name.name}")
    for node in ast.walk(tree):
        kind = node.func.attr if _is_definition(node) else ""
        if kind == "add_argument":
            (argument,) = [a.value for a in node.args if isinstance(a, ast.Constant)]
            found[argument.lstrip("-")] = None
        elif kind and isinstance(node.args[0], ast.Constant):
            readers = {"DEFINE_integer": int, "DEFINE_float": float}
            found[node.args[0].value] = readers.get(kind)
            if kind == "DEFINE_enum":
                found[node.args[0].value] = functools.partial(_one_of, node.args[2], imported)
    return found


def _is_definition(node):
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (node.func.attr.startswith("DEFINE_") or node.func.attr == "add_argument")
    )


def _one_of(known, imported, value):
    """ValueError unless a value is among those of an enumeration, literal or ``sorted(TABLE)``."""
    if isinstance(known, ast.Call):
        table = known.args[0].id
        if table not in imported:
            return
        known = getattr(importlib.import_module(imported[table]), table)
    else:
        known = ast.literal_eval(known)
    if value not in known:
        raise ValueError(f"{value} is none of {', '.join(sorted(known))}")
