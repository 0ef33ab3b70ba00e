"""The table of ``README.md``: its mutations still fit the package, its tests exist and are run."""

import ast
import pathlib
import re

import mutations

ROOT = pathlib.Path(__file__).parent
ROWS = re.findall(
    r"^\| ([^|]+) \| `([\w/]+\.py)` \| `(\w+\.py)::(\w+)` \|$",
    (ROOT / "README.md").read_text("utf-8"),
    re.MULTILINE,
)


def test_every_mutation_fits_its_file_once():
    for mutation in mutations.MUTATIONS:
        text = (mutations.ROOT / "mdm_jax" / mutation.file).read_text("utf-8")
        assert text.count(mutation.old) == 1, (
            f"{mutation.name}: its line of mdm_jax/{mutation.file} was rewritten; adapt "
            f'tests/mutations.py and run python tests/mutations.py "{mutation.name}"'
        )
        assert mutation.old != mutation.new
        ast.parse(text.replace(mutation.old, mutation.new))


def test_the_table_holds_every_mutation():
    assert [row[:2] for row in ROWS] == [(m.name, m.file) for m in mutations.MUTATIONS]
    assert len({row[0] for row in ROWS}) == len(ROWS) >= 100


def test_the_tests_of_the_table_are_there_and_not_slow():
    for name, _, file, test in ROWS:
        (path,) = ROOT.rglob(file)
        (found,) = (
            node
            for node in ast.parse(path.read_text("utf-8")).body
            if isinstance(node, ast.FunctionDef) and node.name == test
        )
        marks = [ast.unparse(decorator) for decorator in found.decorator_list]
        assert "pytest.mark.slow" not in marks, name
