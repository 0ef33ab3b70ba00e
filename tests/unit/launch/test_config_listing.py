"""``mdm config``: every setting with the value that it has, and a line of meaning."""

import ast
import functools

import launching
import pytest

from mdm_jax.launch import config, presets
from mdm_jax.launch.reports import settings

pytestmark = pytest.mark.keyless


@pytest.fixture
def launch(monkeypatch, capsys):
    return functools.partial(launching.call, monkeypatch, capsys)


def listed(out):
    """{path: (value, rest of the line)} as read from a listing."""
    found = {}
    for line in filter(None, out.splitlines()[3:]):
        path, text = line.split(" = ", 1)
        end = next(  # a value may hold spaces: the first end at which Python can read it
            at
            for at in range(1, len(text) + 1)
            if text[at : at + 1] in ("", " ") and _reads(text[:at])
        )
        found[path] = (ast.literal_eval(text[:end]), text[end:].strip())
    return found


def _reads(text):
    try:
        ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return False
    return True


def actual(run, path):
    return functools.reduce(lambda node, part: node[part], path.split("."), run)


@pytest.mark.parametrize("variant", ["", ":smoke"])
@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_setting_of_every_config_is_listed_as_it_is(name, variant):
    run = presets.get_config(name + variant)
    found = listed(settings.listing(run, name + variant))
    assert list(found) == list(config.flat_settings())
    for path, (value, text) in found.items():
        default, rule = config.flat_settings()[path]
        assert value == actual(run, path), path
        assert rule.meaning in text and rule.meaning.strip() and rule.allowed in text, path
        assert text.startswith("* ") == text.endswith(f"default {default!r}") == (value != default)


def test_the_command_lists_sections_and_what_the_command_line_changes(launch):
    changed = ("--config.train.steps=7", "--config.variance.order=()")
    code, out, err = launch(
        "config", "text_block:4", "block", "train.stop", "train.steps", *changed
    )
    assert code == 0 and not err and out.startswith("text_block:4: Block diffusion (BD3-LM)")
    found = listed(out)
    assert {path.rpartition(".")[0] for path in found} == {"block", "train.stop", "train"}
    assert found["block.size"][0] == 4 and found["train.steps"][0] == 7
    assert found["train.steps"][1].endswith("default 500")
    code, everything, _ = launch("config", "text_block:4", *changed)
    assert code == 0 and listed(everything)["variance.order"][0] == ()
    for help_flag in (
        ("train", "--config=text_block:4", *changed, "--help"),
        ("--help", "--mode=train", "--config", "text_block:4", "--workdir=run", *changed),
    ):
        assert launch(*help_flag)[:2] == (0, everything)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "built in are quickstart, "),
        (("quikstart",), "did you mean quickstart?"),
        (("quickstart", "trian"), "config has no field 'trian'; did you mean --config.train"),
        (("quickstart", "train.stepz"), "did you mean --config.train.steps "),
        (("--workdir=nowhere",), "nowhere holds no run"),
    ],
)
def test_what_is_not_there_is_an_error(launch, arguments, expected):
    code, out, err = launch("config", *arguments)
    assert code == 2 and not out and err.startswith("error: ") and expected in err


def test_a_terminal_gets_lines_of_its_width(monkeypatch):
    monkeypatch.setattr(settings.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    run = presets.get_config("quickstart")
    lines = settings.listing(run, "quickstart", ["optimizer", "train.keep_last"]).splitlines()
    assert len(lines) > 20 and max(map(len, lines)) <= 80
    kept = config.flat_settings()["train.keep_last"]
    assert " ".join(" ".join(lines).split()).endswith(
        "train.keep_last = 2 " + settings.explained(kept, 2)
    )
