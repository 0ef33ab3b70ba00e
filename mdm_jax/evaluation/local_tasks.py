"""Tasks for lm-eval whose data lie beside them: NAME.yaml and NAME.jsonl in a folder.

    from mdm_jax.evaluation import local_tasks
    local_tasks.write("tasks", "my_gsm8k", "gsm8k", rows)      # then: mdm eval
    # --include_path=tasks --tasks=my_gsm8k

A YAML is plain text, to be edited; its data file is named relative to its folder.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from mdm_jax.checks import unknown_name

_HEAD = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl
test_split: test
"""
_EXACT = """output_type: generate_until
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
_UNTIL = """generation_kwargs:
  until: {until}
  max_gen_toks: {max_tokens}
"""
_KINDS: dict[str, tuple[tuple[str, ...], str]] = {
    "gsm8k": (
        ("question", "answer"),
        _EXACT
        + """    ignore_case: true
    regexes_to_ignore: [",", "\\\\$", "(?s).*#### ", "\\\\.$"]
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
"""
        + _UNTIL
        + """filter_list:
  - name: strict-match
    filter:
      - function: regex
        regex_pattern: "#### (\\\\-?[0-9\\\\.\\\\,]+)"
      - function: take_first
  - name: flexible-extract
    filter:
      - function: regex
        group_select: -1
        regex_pattern: "(-?[$0-9.,]{2,})|(-?[0-9]+)"
      - function: take_first
metadata: {version: 3.0}
""",
    ),
    "math": (
        ("question", "answer"),
        """output_type: generate_until
metric_list:
  - metric: with_marker
    aggregation: mean
    higher_is_better: true
  - metric: last_number
    aggregation: mean
    higher_is_better: true
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
process_results: !function mdm_jax.evaluation.accuracy.judge
"""
        + _UNTIL
        + "metadata: {version: 1.0}\n",
    ),
    "exact": (
        ("question", "answer"),
        _EXACT
        + """doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
"""
        + _UNTIL
        + "metadata: {version: 1.0}\n",
    ),
    "checked": (
        ("question", "answer", "task"),
        _EXACT
        + """doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
process_results: !function mdm_jax.tasks.stored.check
"""
        + _UNTIL
        + "metadata: {version: 1.0}\n",
    ),
    "choice": (
        ("question", "choices", "answer"),
        """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata: {version: 1.0}
""",
    ),
    "perplexity": (
        ("text",),
        """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
  - metric: byte_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
metadata: {version: 1.0}
""",
    ),
}
KINDS = {name: fields for name, (fields, _) in _KINDS.items()}
"""Kind of task -> fields of its rows. ``gsm8k``: prompt, answer and both filters of lm-eval's;
``math``: the answer after ``####`` (or the row's ``marker``), and the last number;
``exact``: the whole text must be the answer; ``checked``: of ``mdm_jax.tasks``, judged by its
checker; ``choice``: ``answer`` is the number of the right one of ``choices``, compared by
likelihood; ``perplexity``: likelihood of texts."""


def write(
    directory: str | os.PathLike,
    name: str,
    kind: str,
    rows: Iterable[Mapping[str, Any]] | str | os.PathLike,
    *,
    until: tuple[str, ...] = ("\n",),
    max_tokens: int = 256,
    limit: int | None = None,
) -> pathlib.Path:
    """Write a task and its data; returns the YAML.

    Args:
        kind: of :data:`KINDS`; ``gsm8k`` stops at "Question:" whatever ``until`` says.
        rows: dicts, or a JSON Lines file of them (with .xz: compressed); other fields are kept.
        limit: the first rows alone.

    ValueError for an unknown kind, no rows, or a row without the kind's fields.
    """
    if kind not in _KINDS:
        raise unknown_name(kind, _KINDS, "kind of task")
    fields, text = _KINDS[kind]
    rows = list(_read(rows) if isinstance(rows, str | os.PathLike) else rows)[:limit]
    for number, row in enumerate(rows):
        if missing := [field for field in fields if field not in row]:
            raise ValueError(f"row {number} of {name} lacks {', '.join(missing)}: {row}")
    if not rows:
        raise ValueError(f"{name}: no rows")
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
    (directory / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    stops = ("Question:",) if kind == "gsm8k" else until
    text = text.replace("{until}", json.dumps(stops)).replace("{max_tokens}", str(max_tokens))
    yaml = directory / f"{name}.yaml"
    yaml.write_text(_HEAD.replace("{name}", name) + text, "utf-8")
    return yaml


def _read(path: str | os.PathLike) -> list[dict[str, Any]]:
    import lzma

    opener = lzma.open if str(path).endswith(".xz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]
