"""Whether results may be compared, and the paired comparison of two results on tasks."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mdm_jax import files
from mdm_jax.estimates import standard_error_of_mean
from mdm_jax.evaluation.accuracy import bootstrap

DESIGN = ("design", "passes", "replicates", "exact_up_to", "seed", "max_length", "truncate")
DECODING = ("rule", "steps", "block_size", "temperature", "top_p", "guidance", "max_tokens")


EVALUATED = ("split", "unit", "data_fingerprint", "tokenizer_fingerprint", "rows", "passes")
"""Fields of ``evaluation.json`` in which bounds that are compared should agree."""


def unlike(
    evaluations: Mapping[str, Mapping[str, Any]], names: Sequence[str] = EVALUATED
) -> list[str]:
    """Lines about fields in which evaluations by name differ; one without a field is left out."""
    lines = []
    for field in names:
        groups: dict[Any, list[str]] = {}
        for name, evaluation in evaluations.items():
            if field in evaluation:
                groups.setdefault(evaluation[field], []).append(name)
        if len(groups) > 1:
            shown = "; ".join(f"{str(value)[:12]}: {', '.join(of)}" for value, of in groups.items())
            lines.append(
                f"{field.replace('_', ' ')} differs, so that scores may not compare: {shown}"
            )
    return lines


def check_comparable(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What sets two results of ``harness.run_tasks`` apart besides the model, a line each.

    ValueError if they have no task in common, or one on other data (documents or prompts).
    """
    common = [name for name in first["tasks"] if name in second["tasks"]]
    if not common:
        raise ValueError(
            f"no task in common: {', '.join(first['tasks'])} and {', '.join(second['tasks'])}"
        )
    for name in common:
        one, other = first["tasks"][name], second["tasks"][name]
        if one["data"] != other["data"]:
            raise ValueError(
                f"task {name}: the two results are on other documents or prompts "
                f"({one['documents']} and {other['documents']} documents, {one['fewshot']} and "
                f"{other['fewshot']} examples in a prompt); evaluate both with the same --limit, "
                "--num_fewshot, --template and data"
            )
    notes = []
    if first["tokenizer"] != second["tokenizer"]:
        notes.append("tokenizers differ: figures per token cannot be compared, per byte they can")
    likelihood = any(first["tasks"][name]["requests"] != "generate_until" for name in common)
    written = any(first["tasks"][name]["requests"] == "generate_until" for name in common)
    for what, names, read in (("designs", DESIGN, likelihood), ("decoding", DECODING, written)):
        for name in names if read else ():
            pair = [results["settings"].get(name) for results in (first, second)]
            if pair[0] != pair[1]:
                notes.append(f"{what} differ: {name} {pair[0]!r} and {pair[1]!r}")
    for name in ("process", "dtype", "mask_token", "chat_template"):
        pair = [results["audit"].get(name) for results in (first, second)]
        if pair[0] != pair[1]:
            notes.append(f"{name.replace('_', ' ')} differs: {pair[0]} and {pair[1]}")
    if first["model"] == second["model"]:
        notes.append("both are of the same model")
    return notes


def compare_results(first: str | os.PathLike, second: str | os.PathLike) -> str:
    """First minus second by task and metric, paired over documents, with what else differs.

    Reads NAME.json and NAME.jsonl of ``mdm eval``; ValueError as :func:`check_comparable`.
    """
    both = [files.read_json(path) for path in (first, second)]
    for path, results in zip((first, second), both):
        if not {"tasks", "settings", "audit", "tokenizer", "model"} <= results.keys():
            raise ValueError(f"{path}: not results of mdm eval")
    lines = [f"not alike: {note}" for note in check_comparable(*both)]
    values = [_values(path) for path in (first, second)]
    for key in sorted(values[0].keys() & values[1].keys()):
        documents = sorted(values[0][key].keys() & values[1][key].keys())
        one, other = (np.array([v[key][d] for d in documents]) for v in values)
        low, high = bootstrap(one - other)[1:]
        lines.append(
            f"{key}: {one.mean():.4f} - {other.mean():.4f} = {(one - other).mean():+.4f} ± "
            f"{standard_error_of_mean(one - other):.4f} [{low:+.4f}, {high:+.4f}] over "
            f"{len(documents)} documents, {int((one != other).sum())} of them unlike"
        )
    return "\n".join(lines)


def _values(path: str | os.PathLike) -> dict[str, dict[int, float]]:
    """Metrics that are numbers by document; of (log-likelihood, size) the nats per unit of size."""
    found: dict[str, dict[int, float]] = {}
    for line in pathlib.Path(path).with_suffix(".jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        for metric, value in record["metrics"].items():
            if isinstance(value, list):
                metric, value = f"{metric} (nats per unit)", -value[0] / value[1]
            key = f"{record['task']} {metric},{record['filter']}"
            found.setdefault(key, {})[record["document"]] = float(value)
    return found
