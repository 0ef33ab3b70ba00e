"""The page of a run: well-formed, complete, and closed to the outside."""

import html.parser
import json
import math
import re
import types

import pytest

from mdm_jax import files
from mdm_jax.launch import config as launch_config
from mdm_jax.launch.reports import panel
from mdm_jax.launch.reports.page import write_page
from mdm_jax.launch.workdir import WorkdirError, resolved
from mdm_jax.meter.panel import PanelSettings

NASTY = '<script src="https://example.com/x.js">alert(1)</script> & "quoted" \x1b[31m'
VOID = {"meta"}


class Structure(html.parser.HTMLParser):
    """Checks that every tag is closed in order; collects attributes and scripts."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.attributes, self.tags, self.text = [], [], set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    workdir = files.as_path(tmp_path_factory.mktemp("page") / "a <b> run")
    (workdir / "samples").mkdir(parents=True)
    config = launch_config.get_config()
    config.data.update(source="jsonl", path=NASTY)
    files.write_json(workdir / "config.json", resolved(config))
    run = {"command": f"mdm train {NASTY}", "packages": {"jax": "0.10"}, "git_revision": "abc"}
    files.write_json(workdir / "run.json", run)
    files.write_json(
        workdir / "evaluation.json",
        {
            "step": 500,
            "split": "test",
            "unit": "character",
            "rows": 1200,
            "bits_per_unit": 2.5,
            "standard_error_bits_per_unit": 0.01,
            "data_standard_error_bits_per_unit": None,
            "unigram_bits_per_unit": 4.3,
            "bigram_bits_per_unit": None,
            "accuracy": 0.75,
            "accuracy_interval": [0.7, 0.8],
            "answers": 256,
            "answered_by": "first_hitting",
            "temperature": 1.0,
        },
    )
    records = []
    for step in range(10, 510, 10):
        shared = {"step": step}
        records += [
            shared | {"kind": "train", "loss": 3 / math.log(step), "bits_per_unit": 2.0},
            shared
            | {"kind": "monitor", "normalised_loss": 1.5, "normalised_loss_standard_error": 0.1},
            shared | {"kind": "speed", "tokens_per_second": 1000.0 + step, "step_seconds": 0.1},
            shared
            | {"kind": "panel", "share_pattern": 0.71, "share_pattern_standard_error": 0.05}
            | {"share_rate": -0.01, "share_rate_standard_error": 0.03, "share_data": 0.30}
            | {"share_data_standard_error": 0.04, "critical_batch_rows_low": 90.0 + step}
            | ({"critical_batch_rows": 900.0, "critical_batch_rows_high": 2e3} if step % 20 else {})
            | {"effective_sample_size": 0.9, "largest_weight": 3.21}
            | {"tokens_masked": 0.4, "tokens_prompt": 0.35, "tokens_padding": 0.1},
        ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    files.write(workdir / "metrics.jsonl", lines)
    for step, text in ((0, "before " + NASTY), (500, "after " + NASTY)):
        record = {"kind": "answer", "given": "a prompt", "text": text}
        files.write(workdir / "samples" / f"step-{step}.jsonl", json.dumps(record) + "\n")
    path = write_page(workdir)
    assert path == workdir / "report.html"
    return path.read_text()


def test_the_page_is_well_formed_and_refers_to_nothing(page):
    structure = Structure()
    structure.feed(page)
    assert structure.open == []
    assert not structure.tags & {"script", "link", "img", "iframe", "object", "base"}
    for name, value in structure.attributes:
        assert not name.startswith("on")
        if name in ("href", "src", "xlink:href"):
            assert value.startswith("#"), (name, value)
        assert "url(" not in (value or "").replace("url(#", "")
    assert "@import" not in page and re.findall(r"url\((?!#)", page) == []
    assert "<metadata" not in page and "http://" not in page


def test_texts_are_escaped_and_shown(page):
    assert "<script" not in page and "\x1b" not in page
    structure = Structure()
    structure.feed(page)
    text = "".join(structure.text)
    shown = NASTY.replace("\x1b", "\\u001b")
    assert f"before {shown}" in text and f"after {shown}" in text and f"mdm train {shown}" in text
    assert "a <b> run" in text and "Before training" in text and "After step 500" in text


def test_what_the_page_says(page):
    structure = Structure()
    structure.feed(page)
    text = " ".join(structure.text)
    for expected in (
        "2.500 ± 0.010",
        "75.0%",
        "256 prompts",
        "70.0% to 80.0%",
        "1,255",
        "finished",
    ):
        assert expected in text, expected
    for expected in ("71 ± 5 %", "-1 ± 3 %", "> 590", "90%", "3.21", "40% / 35% / 10%", "0.10"):
        assert expected in text, expected
    assert page.count("<svg") == 5  # loss, speed; shares, noise scale, weights
    for label in ("bits per character", "masking rate", "tokens per second", "rows"):
        assert label in text
    assert "default 'embedded'" in text or 'default "embedded"' in text
    assert "all settings" in text


def test_a_run_that_has_only_begun_and_a_directory_without_one(tmp_path):
    workdir = files.as_path(tmp_path / "run")
    with pytest.raises(WorkdirError, match="holds no run"):
        write_page(workdir)
    workdir.mkdir()
    files.write_json(workdir / "config.json", resolved(launch_config.get_config()))
    text = write_page(workdir).read_text()
    assert "at step 0 of 500" in text and "<svg" not in text


# --- what the measurements cost -------------------------------------------------------------------


def planned(batch_size, devices=1, **settings):
    """(settings, rows of a group, fewest steps between measurements) of a run."""
    config = launch_config.get_config()
    config.train.batch_size = batch_size
    config.panel.update(settings)
    mesh = types.SimpleNamespace(shape={"data": devices, "fsdp": 1, "tensor": 1})
    spec = types.SimpleNamespace(batch_size=batch_size)
    objective = types.SimpleNamespace(summed=None)
    experiment = types.SimpleNamespace(config=config, mesh=mesh, spec=spec, objective=objective)
    return (*panel.design(experiment), panel.fewest_steps(experiment))


def test_measurements_take_at_most_their_share_of_the_passes():
    for batch_size, devices in ((32, 1), (8, 1), (256, 8), (8, 8), (3, 1)):
        for cost in (0.01, 0.02, 0.3):
            settings, group, every = planned(batch_size, devices, cost=cost)
            assert settings.passes(group) <= cost * every * batch_size
            assert settings.passes(group) > cost * (every - 1) * batch_size  # and not much less
            assert settings.rows * group <= batch_size
    assert planned(32)[1:] == (1, 50) and planned(256, 8)[1:] == (8, 50) and planned(8, 8)[1] == 1
    assert planned(32, cost=0.0)[2] == planned(1)[2] == 0
    assert PanelSettings().cost == 0.01
