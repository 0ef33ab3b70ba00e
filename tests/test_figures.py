"""Every picture and every table of measured numbers in the docs names its command, in its section.

A command is one that the tests of commands read, or a test or notebook of this repository; for what
follows from a formula, the words "Computed, not measured" beside it.
"""

import re

import commands
import pytest

HEADING = re.compile(r"^#{1,2} .*$", re.MULTILINE)
PICTURE = re.compile(r"!\[[^\]]*\]\([^)]+\)")
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
MEASURED = re.compile(r"\d\.\d|±|\d %|\d[KMG]B")
SOURCE = re.compile(r"(?:tests|notebooks|experiments)/[\w/]+\.(?:py|ipynb)|pytest |Computed, not")


def figures(text):
    """(section, figure) of pictures, and of tables whose cells have measured numbers in a third."""
    text = commands.FENCE.sub(lambda m: m[0].replace("#", " "), text)  # comments are no headings
    starts = [0, *(m.start() for m in HEADING.finditer(text)), len(text)]
    for start, end in zip(starts, starts[1:]):
        section = text[start:end]
        prose = commands.FENCE.sub("", section)
        for match in PICTURE.finditer(prose):
            yield section, match[0]
        for match in TABLE.finditer(prose):
            cells = [c.strip() for line in match[0].splitlines()[2:] for c in line.split("|")[2:-1]]
            if sum(bool(MEASURED.search(cell)) for cell in cells) > len(cells) / 3:
                yield section, match[0]


def has_command(section):
    fenced = (c for m in commands.FENCE.finditer(section) for c in commands.of_block(m[3], "", 0))
    return bool(any(fenced) or commands.INLINE.search(section) or SOURCE.search(section))


@pytest.mark.parametrize("page", commands.PAGES)
def test_figures_name_their_commands(page):
    text = (commands.ROOT / page).read_text("utf-8")
    bare = [figure for section, figure in figures(text) if not has_command(section)]
    assert not bare, f"no command in the section of:\n{bare[0]}"


@pytest.mark.parametrize("page", commands.PAGES)
def test_columns_of_tables_have_names(page):
    text = commands.FENCE.sub("", (commands.ROOT / page).read_text("utf-8"))
    headers = [match[0].split("\n")[0].strip() for match in TABLE.finditer(text)]
    assert [h for h in headers if not all(c.strip() for c in h.strip("|").split("|"))] == []


def test_figures_are_found():
    table = "| a | b |\n|---|---|\n| x | 1.5 |\n"
    words = table.replace("1.5", "y")
    text = f"# A\n{table}\n![p](p.png)\n## B\n{table}\n`make test`\n## C\n{words}"
    found = list(figures(text))
    assert len(found) == 3
    assert [has_command(section) for section, _ in found] == [False, False, True]
