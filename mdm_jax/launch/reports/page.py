"""The mode ``report``: a run on one page, ``report.html``, from the files in its directory.

The page is complete in itself: figures are SVG elements, nothing is loaded from elsewhere, no
script runs. All text of models, data and settings is escaped.
"""

import functools
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mdm_jax import files, plots, training
from mdm_jax.data.tokenizers import printable
from mdm_jax.launch import config as launch_config
from mdm_jax.launch.reports.curves import SIZE, Curve, is_exact, noise_curves, training_curves
from mdm_jax.launch.reports.panel import whole_rows
from mdm_jax.launch.workdir import WorkdirError, differences, read_config, resolved, writing
from mdm_jax.meter.panel import PARTS

NAME = "report.html"
_SAMPLES = 6
"""Samples shown of each file."""

Record = Mapping[str, Any]


def write_page(workdir: files.Path) -> files.Path:
    """Write ``report.html`` anew; returns its path.

    For a run that has begun, finished or not. WorkdirError if the directory holds none, ValueError
    for a damaged file.
    """
    config = read_config(workdir)
    if config is None:
        raise WorkdirError(f"{workdir} holds no run (no config.json); train one first")
    records = []
    if (workdir / "metrics.jsonl").exists():
        records = training.read_metrics(workdir / "metrics.jsonl")
    path = workdir / NAME
    page = _page(
        name=workdir.name or str(workdir),
        config=config,
        run=_read(workdir / "run.json"),
        evaluation=_read(workdir / "evaluation.json"),
        records=records,
        samples=_samples(workdir / "samples"),
    )
    with writing(path):
        files.write(path, page)
    return path


def _read(path: files.Path) -> Record:
    return files.read_json(path) if path.exists() else {}


def _samples(directory: files.Path) -> list[tuple[int, list[Record]]]:
    """(step, records) of the first and the last step that samples were drawn at."""
    by_step = {}
    for path in sorted(directory.glob("step-*.jsonl")) if directory.exists() else ():
        step = int(re.match(r"step-(\d+)", path.name)[1])
        if files.size(path):  # others may be writing empty ones
            by_step[step] = path
    ends = sorted({*by_step} & {0, max(by_step, default=0)})
    return [(step, [r for _, r in files.read_records(by_step[step])]) for step in ends]


def _page(
    *,
    name: str,
    config: Record,
    run: Record,
    evaluation: Record,
    records: Sequence[Record],
    samples: Sequence[tuple[int, Sequence[Record]]],
) -> str:
    kinds = {r["kind"] for r in records}
    of = {kind: [r for r in records if r["kind"] == kind] for kind in kinds}
    step, steps = max((r["step"] for r in of.get("train", [])), default=0), config["train"]["steps"]
    status = "finished" if step >= steps and evaluation else f"at step {step:,} of {steps:,}"
    panel = of.get("panel", [])
    curves = training_curves(config, records, evaluation)
    if speeds := of.get("speed"):
        draw_speed = functools.partial(plots.speed, records=speeds)
        curves.append(Curve("speed", draw_speed, "Training alone, without validations."))
    chain = " → ".join(config["variance"]["order"]) or "independent draws"
    what = f"{config['process']} diffusion", f"variance {chain} · "
    if config["process"] == "autoregressive":
        what = "autoregressive model", ""
    subtitle = (
        f"{what[0]} on {config['data']['source']} data · {what[1]}"
        f"batches of {config['train']['batch_size']} rows · {status}"
    )
    parts = [
        tag("header", f"<h1>{text(name)}</h1><p>{text(subtitle)}</p>{_command(run)}"),
        section("Results", _cards(_results(evaluation, of, is_exact(config)))),
        section("Training", _figures(_drawn(curves))),
    ]
    if panel and config["process"] != "autoregressive":
        latest: dict[str, float] = {}
        for record in panel:
            latest |= record
        noise = _noise(latest, panel[-1], config)
        noise += _figures(_drawn(noise_curves(config, panel)))
        parts.append(section("Where the gradient's noise comes from", noise))
    if samples:
        parts.append(section("Samples", _sample_columns(samples)))
    parts.append(section("Settings", _settings(config)))
    parts.append(section("Versions", table(_versions(run))))
    return document(name, parts)


# --- figures and numbers --------------------------------------------------------------------------


def _results(
    evaluation: Record, of: Mapping[str, Sequence[Record]], exact: bool
) -> list[tuple[str, str, str]]:
    """(name, value, explanation) of the results known so far."""
    cards, kind = [], "exact likelihood" if exact else "likelihood bound"
    if "bits_per_unit" in evaluation:
        unit = evaluation["unit"]
        error = evaluation.get("standard_error_bits_per_unit")
        about = (
            f"bits per {unit}, {evaluation['split']} split, {evaluation['rows']:,} rows, parameters"
            f" of step {evaluation['step']:,}; {'± Monte Carlo error, ' * (not exact)}over rows "
            f"± {_number(evaluation.get('data_standard_error_bits_per_unit'))}"
        )
        cards.append((f"held-out {kind}", _pm(evaluation["bits_per_unit"], error, exact), about))
    elif (evaluated := of.get("evaluate")) and "bits_per_unit" in evaluated[-1]:
        last = evaluated[-1]
        value = _pm(last["bits_per_unit"], plots.bits_error(last), exact)
        cards.append((f"validation, {kind}", value, f"bits per unit, at step {last['step']:,}"))
    if "accuracy" in evaluation:
        low, high = evaluation["accuracy_interval"]
        about = (
            f"of {evaluation['answers']:,} prompts; 95 % interval {low:.1%} to {high:.1%}; answered"
            f" by {evaluation['answered_by']}, temperature {evaluation['temperature']:g}"
        )
        cards.append(("accuracy", f"{evaluation['accuracy']:.1%}", about))
    last = (of.get("evaluate") or [{}])[-1]
    for name, label in (("preference_accuracy", "preference accuracy"), ("reward", "reward")):
        found, where = (evaluation, evaluation.get("split")) if name in evaluation else (
            last, f"validation, at step {last.get('step')}"
        )  # fmt: skip
        if found.get(name) is not None:
            value = _pm(found[name], found.get(f"{name}_standard_error"))
            cards.append((f"held-out {label}", value, f"{where}; ± over pairs or prompts"))
    if speeds := [r["tokens_per_second"] for r in of.get("speed", [])]:
        about = f"tokens per second, median of {len(speeds)} readings"
        cards.append(("speed", f"{np.median(speeds):,.0f}", about))
    return cards


def _noise(latest: Record, last: Record, config: Record) -> str:
    """The panel's figures in words, bars and numbers."""
    cards, rows = [], config["train"]["batch_size"]
    if all(f"share_{name}" in latest for name in PARTS):
        bar = _bar([(f"share_{name}", label) for name, label in zip(PARTS, _LABELS)], latest)
    else:
        bar = (
            "<p>No measurement yet: this run is shorter than the steps between two of them "
            "(panel.cost), or has no noise of masks.</p>"
        )
    if "critical_batch_rows" in last:
        low, high = last["critical_batch_rows_low"], last["critical_batch_rows_high"]
        about = f"rows, {low:,.0f} to {high:,.0f} within two standard errors; this run takes {rows}"
        if "critical_batch_tokens" in last:
            about += f". In eligible tokens {last['critical_batch_tokens']:,.0f}"
        cards.append(("critical batch size", whole_rows(last["critical_batch_rows"]), about))
    elif "critical_batch_rows_low" in last:
        about = f"rows: the signal is within two standard errors of none. This run takes {rows}"
        cards.append(("critical batch size", f"> {last['critical_batch_rows_low']:,.0f}", about))
    if "effective_sample_size" in latest:
        size = f"{latest['effective_sample_size']:.0%}"
        about = "of the draws, under the importance weights of the levels; 100 %: equal weights"
        cards.append(("effective sample size", size, about))
        about = "importance weight of the run; equal weights are 1"
        cards.append(("largest weight", f"{latest['largest_weight']:.2f}", about))
    names = ("masked", "prompt", "padding")
    if all(f"tokens_{name}" in latest for name in names):
        value = " / ".join(f"{latest[f'tokens_{name}']:.0%}" for name in names)
        cards.append(("masked / prompt / padding", value, "shares of all positions of a batch"))
    return bar + _cards(cards)


def _drawn(curves: Iterable[Curve]) -> list[tuple[str, str]]:
    """(SVG, caption) of each."""
    return [(plots.svg(curve.draw, SIZE, curve.name), curve.caption) for curve in curves]


# --- pieces of HTML -------------------------------------------------------------------------------


def document(title: str, parts: Iterable[str]) -> str:
    """A self-contained page."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{text(title)} · mdm_jax</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


_LABELS = ("A: mask pattern", "B: masking rate", "C: data")


def text(value: Any) -> str:
    """Text as HTML; control characters are shown as escapes."""
    return html.escape(printable(str(value)), quote=True)


def tag(name: str, content: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<{name}{attribute}>{content}</{name}>"


def section(title: str, content: str) -> str:
    return tag("section", f"<h2>{text(title)}</h2>\n{content}") if content else ""


def _cards(cards: Iterable[tuple[str, str, str]]) -> str:
    shown = (
        tag("div", f"<h3>{text(n)}</h3><b>{text(v)}</b><p>{text(about)}</p>", "card")
        for n, v, about in cards
    )
    return tag("div", "\n".join(shown), "cards")


def _figures(figures: Iterable[tuple[str, str]]) -> str:
    shown = (
        f"<figure>{image}<figcaption>{text(caption)}</figcaption></figure>"
        for image, caption in figures
    )
    return tag("div", "\n".join(shown), "figures")


def _bar(names: Sequence[tuple[str, str]], values: Record) -> str:
    """A stacked bar of shares, negative ones as zero, and their numbers."""
    kept = [max(values[name], 0.0) for name, _ in names]
    total, segments, legend = sum(kept) or 1.0, [], []
    for number, ((name, label), share) in enumerate(zip(names, kept)):
        segments.append(f'<i class="c{number}" style="width:{100 * share / total:.2f}%"></i>')
        error = values.get(f"{name}_standard_error")
        shown = f"{100 * values[name]:.0f}" + ("" if error is None else f" ± {100 * error:.0f}")
        legend.append(f'<span><i class="c{number}"></i>{text(label)} <b>{shown} %</b></span>')
    return tag("div", "".join(segments), "bar") + tag("p", "".join(legend), "legend")


def _command(run: Record) -> str:
    return f"<pre>{text(run['command'])}</pre>" if run.get("command") else ""


def _sample_columns(samples: Sequence[tuple[int, Sequence[Record]]]) -> str:
    columns = []
    for step, records in samples:
        title = "Before training" if step == 0 else f"After step {step:,}"
        shown = []
        for record in records[:_SAMPLES]:
            lines = [f"<h4>{text(record.get('kind', ''))}</h4>"]
            for name in ("given", "original"):
                if name in record:
                    lines.append(f"<p><em>{name}</em></p><pre>{text(record[name])}</pre>")
            lines.append(f'<p><em>generated</em></p><pre class="new">{text(record["text"])}</pre>')
            shown.append(tag("article", "".join(lines)))
        columns.append(tag("div", f"<h3>{title}</h3>" + "".join(shown)))
    return tag("div", "".join(columns), "columns")


def _settings(config: Record) -> str:
    defaults = resolved(launch_config.get_config())
    known = {name: value for name, value in config.items() if name in defaults}
    changed = []
    for line in differences({name: defaults[name] for name in known}, known):
        name, _, values = line.partition(": ")
        old, _, new = values.partition(" -> ")
        changed.append((name, new, f"default {old}"))
    whole = text(json.dumps(config, indent=1, ensure_ascii=False)).replace("\\n", "\n")
    return (
        table(changed) if changed else "<p>All settings are the defaults.</p>"
    ) + f"<details><summary>all settings</summary><pre>{whole}</pre></details>"


def _versions(run: Record) -> list[tuple[str, ...]]:
    plain = [(name, str(run[name])) for name in _PROVENANCE if name in run]
    return plain + [(n, str(v)) for n, v in run.get("packages", {}).items()]


_PROVENANCE = ("started", "seed", "git_revision", "python", "platform")


def table(rows: Iterable[Sequence[str]]) -> str:
    lines = ("".join(tag("td", text(cell)) for cell in row) for row in rows)
    return tag("table", "".join(tag("tr", line) for line in lines))


def _number(value: float | None) -> str:
    return "unknown" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _pm(value: float, error: float | None, exact: bool = False) -> str:
    return f"{value:.3f}" + ("" if exact else f" ± {_number(error)}")


_STYLE = """
:root { color-scheme: light; --ink: #1d2430; --soft: #5b6675; --line: #e3e7ec; --ground: #f6f7f9;
  --c0: #0072b2; --c1: #e69f00; --c2: #009e73; }  /* plots.PALETTE */
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 2rem 1.25rem 4rem; color: var(--ink);
  background: var(--ground); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 0 0 .8rem; font-size: 1.1rem; }
h3 { margin: 0; font-size: .8rem; font-weight: 600; color: var(--soft); }
h4 { margin: .8rem 0 0; font-size: .8rem; }
header p { margin: .2rem 0 .8rem; color: var(--soft); }
section { margin-top: 1.25rem; padding: 1.1rem 1.25rem 1.25rem; background: #fff;
  border: 1px solid var(--line); border-radius: 10px; }
pre { margin: 0; padding: .6rem .8rem; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; background: #f1f3f6; border-radius: 6px;
  font: 12.5px/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, monospace; }
pre.new { background: #eef6ee; }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); }
.card { padding: .8rem .9rem; border: 1px solid var(--line); border-radius: 8px; }
.card b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; }
.card p { margin: .1rem 0 0; font-size: .8rem; color: var(--soft); }
.figures { display: grid; gap: 1.2rem 1.6rem; margin-top: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); }
figure { margin: 0; max-width: 640px; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { font-size: .8rem; color: var(--soft); }
.bar { display: flex; height: 22px; overflow: hidden; border-radius: 6px; }
.bar i { display: block; height: 100%; }
.legend { margin: .5rem 0 1rem; }
.legend span { margin-right: 1.6rem; white-space: nowrap; }
.legend i { display: inline-block; width: .75rem; height: .75rem; margin-right: .4rem;
  border-radius: 3px; }
.c0 { background: var(--c0); } .c1 { background: var(--c1); } .c2 { background: var(--c2); }
.columns { display: grid; gap: 1.4rem; grid-template-columns: repeat(auto-fit,
  minmax(min(420px, 100%), 1fr)); }
.columns em { font-size: .8rem; color: var(--soft); }
.columns p { margin: .4rem 0 .2rem; }
table { border-collapse: collapse; font-size: .85rem; }
td { padding: .25rem 1.2rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
details { margin-top: .8rem; }
summary { cursor: pointer; color: var(--soft); }
@media print { body { background: #fff; padding: 0; } section { break-inside: avoid; } }
"""
