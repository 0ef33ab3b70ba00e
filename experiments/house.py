"""Size and shape of the package, and the CPU time of its tests: ``make house``.

python -m experiments.house [--root=CHECKOUT] [--suite]

``--root`` looks at another checkout (for before and after); ``--suite`` runs its default tests and
times them, in one run with whatever else the machine does. Old layouts are understood.
"""

import argparse
import ast
import pathlib
import resource
import subprocess
import sys
import time

WINGS = ("gaussian", "meter", "evaluation", "tasks", "plots", "testing", "hub", "launch")
"""Rooms that the core may not import; everything else of the package is the core."""

PACKAGE = "mdm_jax"
OLD_LAUNCHER = ("study", "recipes", "gradient_noise")  # files of experiments/ that never launched


def modules(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Dotted name -> file, of every module of the package."""
    files = sorted((root / PACKAGE).rglob("*.py"))
    names = (".".join(path.relative_to(root).with_suffix("").parts) for path in files)
    return {name.removesuffix(".__init__"): path for name, path in zip(names, files)}


def lines(paths) -> int:
    """Lines of files, as ``wc -l`` counts them."""
    return sum(path.read_text("utf-8").count("\n") for path in paths)


def imports(path: pathlib.Path, known: dict[str, pathlib.Path]) -> set[str]:
    """Modules of the package that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names}
    return found & set(known)


def circles(known: dict[str, pathlib.Path]) -> list[list[str]]:
    """Groups of files that import each other in a circle; ``__init__`` files are not followed."""
    graph = {name: imports(path, known) for name, path in known.items() if path.stem != "__init__"}
    graph = {name: targets & set(graph) - {name} for name, targets in graph.items()}

    def reachable(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for target in graph[todo.pop()] - seen:
                seen.add(target)
                todo.append(target)
        return seen

    reach = {name: reachable(name) for name in graph}
    groups = {frozenset(b for b in reach[a] if a in reach[b]) for a in graph}
    return [sorted(group) for group in groups if group]


def config_places(root: pathlib.Path) -> int:
    """Functions of the launcher that take a config."""
    folder = root / PACKAGE / "launch"
    if folder.exists():
        files = list(folder.rglob("*.py"))
    else:
        files = [
            path
            for path in (root / "experiments").glob("*.py")
            if not path.stem.startswith(OLD_LAUNCHER)
        ]
    count = 0
    for path in files:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                count += any(
                    argument.arg == "config"
                    or (argument.annotation and "ConfigDict" in ast.unparse(argument.annotation))
                    for argument in arguments
                )
    return count


def exported(path: pathlib.Path) -> int:
    """Names that an ``__init__.py`` hands on."""
    tree = ast.parse(path.read_text("utf-8"))
    return sum(len(node.names) for node in tree.body if isinstance(node, ast.ImportFrom))


def suite(root: pathlib.Path, *arguments: str) -> tuple[float, float, str]:
    """(CPU seconds, wall seconds, last line) of pytest on two workers."""
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", *arguments]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - start
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, wall, run.stdout.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path(__file__).parents[1])
    parser.add_argument("--suite", action="store_true", help="also time the default tests")
    options = parser.parse_args()
    root = options.root.resolve()
    known = modules(root)
    core = {
        name: path
        for name, path in known.items()
        if not any(f"{name}.".startswith(f"{PACKAGE}.{wing}.") for wing in WINGS)
    }
    print(f"files in the package            {len(known)}, of them core {len(core)}")
    print(f"lines in the package            {lines(known.values())}, core {lines(core.values())}")
    longest = max(known.values(), key=lambda path: lines([path]))
    print(f"longest file                    {longest.relative_to(root)} {lines([longest])}")
    folders = {}
    for path in known.values():
        folders[path.parent] = folders.get(path.parent, 0) + (path.stem != "__init__")
    fullest = max(folders, key=folders.get)
    print(f"fullest folder                  {fullest.relative_to(root)} {folders[fullest]} files")
    found = circles(known)
    print(f"circles between files           {len(found)} {found or ''}")
    print(f"functions that take a config    {config_places(root)}")
    print(f"names in variance.__init__      {exported(root / PACKAGE / 'variance/__init__.py')}")
    tests = list((root / "tests").rglob("*.py"))
    print(f"test files, lines               {len(tests)}, {lines(tests)}")
    if options.suite:
        cpu, wall, last = suite(root)
        print(f"default tests                   {cpu:.0f} CPU s, {wall:.0f} s of wall time: {last}")
        if (root / "tests/unit").exists():
            cpu, wall, last = suite(root, "tests/unit")
            print(f"tests/unit                      {cpu:.0f} CPU s, {wall:.0f} s: {last}")


if __name__ == "__main__":
    main()
