"""CONTRIBUTING's table "where is what": every row leads to a definition."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
ROWS = re.findall(
    r"^\| ([^|]+) \| `([\w/]+\.py)` \| `(\w+)` \|$",
    (ROOT / "CONTRIBUTING.md").read_text("utf-8"),
    re.MULTILINE,
)


def test_the_table_is_found():
    assert len(ROWS) >= 30 and len({name for _, _, name in ROWS}) == len(ROWS)


@pytest.mark.parametrize("path, name", [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_row_leads_to_a_definition(path, name):
    defined = set()
    for node in ast.parse((ROOT / path).read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign):
            defined.add(node.target.id)
    assert name in defined
