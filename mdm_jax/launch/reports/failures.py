"""The page of failures of an evaluation on tasks: wrong answers, self-contained HTML."""

from collections.abc import Mapping, Sequence
from typing import Any

from mdm_jax import files
from mdm_jax.launch.reports.page import document, section, table, tag, text
from mdm_jax.likelihood import audit_line

_SHOWN = 200  # of each task


def is_failure(record: Mapping[str, Any]) -> bool:
    """Whether the first of its metrics that is a number, not a log-likelihood, is below 1."""
    metrics = record["metrics"].items()
    values = (v for name, v in metrics if isinstance(v, int | float) and name != "perplexity")
    return next(values, 1.0) < 1


def write_failures(
    path: files.Path, results: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> None:
    """Write the page of the wrong answers among the records of ``evaluation.harness.run_tasks``."""
    head = tag("header", f"<h1>Failures</h1><p>{text(audit_line(results['audit']))}</p>")
    parts = [head, section("Results", table(result_rows(results)))]
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:  # a document has a record of each filter
        groups.setdefault((record["task"], record["filter"]), []).append(record)
    for (name, kind), own in groups.items():
        failed = [record for record in own if is_failure(record)]
        shown = "".join(map(_article, failed[:_SHOWN]))
        rest = len(failed) - _SHOWN
        shown += f"<p>{rest} more are in the records.</p>" if rest > 0 else ""
        title = f"{name}, {kind}: {len(failed)} of {len(own)} wrong"
        parts.append(section(title, shown or "<p>None.</p>"))
    files.write(path, document("Failures", parts))


def result_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(task, metric, value ± standard error) of results."""
    rows = []
    for task, found in {**results["tasks"], **_grouped(results)}.items():
        for metric, figure in found["metrics"].items():
            error = figure["standard_error"]
            shown = f"{figure['value']:.4f}" + ("" if error is None else f" ± {error:.4f}")
            rows.append((task, metric, shown))
        for metric, figures in found.get("repeats", {}).items():
            for kind, own in figures.items():
                shown = f"{own['value']:.4f} [{own['low']:.4f}, {own['high']:.4f}]"
                rows.append((task, f"{metric} {kind}", shown))
        monte_carlo = found.get("monte_carlo", {})
        if monte_carlo.get("unsure_documents") is not None:
            count = f"{monte_carlo['unsure_documents']} of {found['documents']}"
            rows.append((task, "choices within two Monte Carlo errors", count))
        for metric, error in monte_carlo.get("standard_errors", {}).items():
            rows.append((task, f"{metric}, Monte Carlo error", f"± {error:.4g}"))
    return rows


def _grouped(results: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {"metrics": metrics} for name, metrics in results.get("groups", {}).items()}


def _article(record: Mapping[str, Any]) -> str:
    lines = [f"<h4>document {record['document']}, filter {text(record['filter'])}</h4>"]
    lines.append(f"<p><em>prompt</em></p><pre>{text(record['prompt'])}</pre>")
    if "answer" in record:
        lines.append(f'<p><em>answer</em></p><pre class="new">{text(record["answer"])}</pre>')
        lines.append(f"<p><em>target</em></p><pre>{text(record['target'])}</pre>")
    else:
        errors = record["standard_errors"]
        found = zip(record["continuations"], record["log_likelihoods"], errors)
        rows = [
            (choice, f"{nats:.3f}" + ("" if error is None else f" ± {error:.3f}"))
            for choice, nats, error in found
        ]
        lines.append(table([("continuation", "log-likelihood, nats"), *rows]))
        lines.append(f"<p><em>target</em> {text(record['target'])}</p>")
    return tag("article", "".join(lines))
