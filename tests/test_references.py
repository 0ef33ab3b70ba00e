"""Names in docstrings and docs that look like ours lead to something."""

import ast
import functools
import importlib
import inspect
import pathlib
import re

import pytest

from mdm_jax.launch import config as launch_config
from mdm_jax.launch import presets

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted({*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"})
SOURCES = sorted(path for top in ("mdm_jax", "experiments") for path in ROOT.glob(f"{top}/**/*.py"))
TOPS = {path.stem for path in (ROOT / "mdm_jax").iterdir() if not path.name.startswith("_")}
ROLE = re.compile(r":(?:func|class|mod|meth|attr|data|exc):`~?\.?([\w.]+)`")
DOTTED = re.compile(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)(?:\([^`]*\))?`")
FILES = re.compile(r"`((?:mdm_jax|experiments|tests|docs|notebooks)/[\w./-]*)`")
FLAGS = re.compile(r"--config\.([\w.]*\w)")
PRESETS = re.compile(r"--config=([a-z]\w*)(?![\w/.])")
MODULES = re.compile(r"python -m ((?:mdm_jax|experiments)[\w.]*)")
TARGETS = re.compile(r"`make ([a-z][\w-]*)`")
LINKS = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")


@functools.cache
def imported(name):
    """The module or attribute of a dotted name; None if there is none."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        head, _, tail = name.rpartition(".")
        return head and member(imported(head), tail)


def member(owner, name):
    """An attribute, or a field that instances have."""
    if hasattr(owner, name):
        return getattr(owner, name)
    if inspect.isclass(owner):
        fields = {f for c in owner.__mro__ for f in getattr(c, "__annotations__", ())}
        if name in fields or re.search(rf"self\.{name}\b", inspect.getsource(owner)):
            return True
    return None


def leads_somewhere(name, scopes):
    """Whether a dotted name is found from one of the scopes: modules or classes."""
    for scope in scopes:
        target = scope
        for part in name.split("."):
            target = None if target is None else member(target, part)
        if target is not None:
            return True
    return any(imported(f"{prefix}{name}") is not None for prefix in ("", "mdm_jax."))


def setting(name):
    """Whether a dotted name is a section or a setting of a config."""
    node = launch_config.get_config()
    for part in name.split("."):
        if not hasattr(node, "keys") or part not in node:
            return False
        node = node[part]
    return True


def is_ours(name):
    head, tail = name.split(".")[0], name.rsplit(".")[-1]
    ours = head in TOPS | {"mdm_jax", "experiments"} or head in launch_config.get_config()
    return ours and tail not in ("json", "jsonl", "md", "py", "csv", "npz", "svg", "png")


def wrong_names(text, scopes):
    found = {name for name in ROLE.findall(text) if not leads_somewhere(name, scopes)}
    for name in DOTTED.findall(text):
        if is_ours(name) and not leads_somewhere(name, scopes) and not setting(name):
            found.add(name)
    return found | wrong_commands(text)


@functools.cache
def targets():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    return set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))


def wrong_commands(text):
    wrong = {f"--config.{name}" for name in FLAGS.findall(text) if not setting(name)}
    wrong |= {f"--config={n}" for n in PRESETS.findall(text) if n not in presets.PRESETS}
    wrong |= {f"-m {name}" for name in MODULES.findall(text) if imported(name) is None}
    wrong |= {f"make {name}" for name in TARGETS.findall(text) if name not in targets()}
    return wrong | {name for name in FILES.findall(text) if not (ROOT / name).exists()}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_names_and_links_of_a_page(page):
    text = page.read_text("utf-8")
    links = {link for link in LINKS.findall(text) if not (page.parent / link).exists()}
    assert not links | wrong_names(text, ())


def test_names_in_docstrings():
    wrong = {}
    for path in SOURCES:
        tree = ast.parse(path.read_text("utf-8"))
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = imported(".".join(p for p in parts if p not in ("__init__", "__main__")))
        package = imported(".".join(parts[:-1]))
        classes = [getattr(module, n.name) for n in tree.body if isinstance(n, ast.ClassDef)]
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = (ast.get_docstring(node) or "").replace("\n", " ")
                found |= wrong_names(text, [module, package, *classes])
        if found:
            wrong[str(path.relative_to(ROOT))] = sorted(found)
    assert not wrong
