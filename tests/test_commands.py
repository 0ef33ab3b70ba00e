"""Commands of README, docs and config headers are read as those who type them would have them."""

import re
import runpy

import commands
import pytest


@pytest.fixture
def here(monkeypatch):
    import grain  # noqa: F401  (defines flags when imported, which the flag saver would remove)

    monkeypatch.chdir(commands.ROOT)


@pytest.mark.parametrize("page", commands.PAGES)
def test_commands_of_a_page_are_read(page, here):
    for command in commands.of_page(page):
        commands.check(command)


@pytest.mark.parametrize("file", commands.HEADERS)
def test_commands_of_a_config_header_are_read(file, here):
    for command in commands.of_header(file):
        commands.check(command)


def test_commands_are_found():
    readme = commands.of_page("README.md")
    assert ("make", "quickstart") in [command.words for command in readme]
    assert sum(command.words[0] == "mdm" for command in readme) >= 5
    assert any(c.words[:2] == ("mdm", "train") for c in commands.of_page("docs/pods.md"))
    assert len([c for page in commands.PAGES for c in commands.of_page(page)]) > 80
    assert len([c for file in commands.HEADERS for c in commands.of_header(file)]) >= 10


@pytest.mark.parametrize(
    "line",
    [
        "mdm train --config=quikstart --workdir=a",
        "mdm train --config=quickstart --workdir=a --config.train.stepz=3",
        "mdm train --config=quickstart --workdir=a --config.train.steps=many",
        "mdm train --config=quickstart --workdir=a --config.train.steps=-1",
        "mdm train --config=quickstart --workdir=a --config.variance.order=\"('stratifid',)\"",
        "mdm train --config=quickstart --workdir=a --stepz=3",
        "mdm train --config=quickstart --workdir=a surplus",
        "mdm variance --workdir=a --config.measure.methods=\"('miror',)\"",
        'mdm sweep --config=quickstart --workdir=a --over="sed=0,1"',
        "mdm eval --workdir=a --tasks=b --settings=passez=3",
        "mdm export --workdir=a --to=b --config.train.steps=3",
        "python -m experiments.nothing",
        "python -m experiments.study --suite=nothing --workdir=a",
        "python -m experiments.benchmarks.fine_tuning --tuned_rows=many",
        "python -m experiments.recipes --nothing",
        "make nothing",
        "pip install 'mdm_jax[nothing]'",
    ],
)
def test_what_is_wrong_is_noticed(line, here):
    with pytest.raises(AssertionError, match="somewhere"):
        commands.check(commands.Command("somewhere", commands.words_of(line)))


def test_blocks_are_cut_into_commands():
    block = "A=1 mdm train \\\n  --workdir=b  # why\nprinted 1 'x\nnohup mdm chat > log &\n"
    block += "error: no run\n"
    found = commands.of_block(block, "page", 1)
    assert [command.refused for command in found] == [False, True]
    words = [command.words for command in found]
    assert words == [("mdm", "train", "--workdir=b"), ("mdm", "chat")]
    with pytest.raises(AssertionError, match="page:1: no command"):
        commands.of_block("mdn train", "page", 1, labelled=True)


@pytest.mark.parametrize("page", ["docs/faq.md", "docs/tasks.md"])
def test_python_of_a_page_runs(page, tmp_path, capsys):
    """Whole programs; those of own_loop.md are in test_layers.py, longer ones in test_pages.py."""
    text = (commands.ROOT / page).read_text("utf-8")
    blocks = [match[3] for match in commands.FENCE.finditer(text) if match[2] == "python"]
    assert blocks
    for block in blocks:
        (tmp_path / "block.py").write_text(block, "utf-8")
        runpy.run_path(str(tmp_path / "block.py"))
    printed = capsys.readouterr().out.split("\n")
    shown = re.findall(r"prints `([^`]+)`", text)
    assert [line for line in printed if line] == shown
