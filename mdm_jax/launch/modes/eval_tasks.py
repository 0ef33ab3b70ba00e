"""The mode ``eval``: tasks of lm-eval on a run or a model of others, and comparing two results."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import yaml
from absl import flags
from ml_collections import ConfigDict

from mdm_jax import distributed, files, hub, sharding
from mdm_jax.checks import unknown_name
from mdm_jax.evaluation.answering import Answerer, Journal
from mdm_jax.evaluation.model import EvaluatedModel
from mdm_jax.evaluation.paired import compare_results
from mdm_jax.evaluation.settings import Settings
from mdm_jax.launch.modes.chat import tokenizer_of
from mdm_jax.launch.modes.export import merged, open_run
from mdm_jax.launch.reports.failures import result_rows, write_failures
from mdm_jax.launch.workdir import new_files, saved_config, writing
from mdm_jax.likelihood import audit_line

_TASKS = flags.DEFINE_list("tasks", [], "eval: names of tasks.")
_LIMIT = flags.DEFINE_integer("limit", None, "eval: first documents of each task alone.", 1)
_INCLUDE = flags.DEFINE_list("include_path", [], "eval: folders with tasks and data of your own.")
_FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "eval: examples in a prompt.", 0)
_TRIES = flags.DEFINE_integer("tries", 1, "eval: answers to each prompt, for pass@k.", 1)
_BATCH = flags.DEFINE_integer("eval_batch", 64, "eval: requests between two writes.", 1)
_SHARDS = flags.DEFINE_integer(
    "shards", 1, "eval --source: devices that share the parameters; rows go to the others too.", 1
)
_SETTINGS = flags.DEFINE_string(
    "settings",
    "",
    'eval: how requests are answered, as in "passes=32,replicates=8,rule=llada,block_size=32"; '
    f"all: {', '.join(f.name for f in dataclasses.fields(Settings))}.",
)
_STREAM = flags.DEFINE_bool(
    "stream", False, "eval: generated rows that are done make room for others, on one device."
)
_COMPARE = flags.DEFINE_list("compare", [], "eval: two files of results, instead of tasks.")


def comparing() -> bool:
    """Whether two results are to be compared, for which no model is needed."""
    return bool(_COMPARE.value)


def settings(text: str, given: dict[str, Any]) -> Settings:
    """Settings of ``name=value,...`` and those ``given`` by flags of their own; ValueError."""
    known, values = [field.name for field in dataclasses.fields(Settings)], dict(given)
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if name not in known:
            raise unknown_name(name, known, "setting of --settings")
        if not equals:
            raise ValueError(f"--settings: {part!r} needs a value, as in passes=32")
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--settings: {part!r} has no value that can be read") from error
    try:
        return Settings(**values)
    except TypeError as error:
        raise ValueError(f"--settings={text}: {error}") from error


def subject_of_run(
    workdir: files.Path, config: ConfigDict, last: bool, moved: str | None = None
) -> EvaluatedModel:
    """The model of a run to evaluate: the best averages, or those of the ``last`` step.

    ``moved``: where its source is now.
    """
    mesh = sharding.make_mesh(**config.mesh)
    run = open_run(workdir, last, mesh=mesh, moved=moved, uniform=True)
    model, saved = merged(run, workdir), saved_config(workdir)
    return EvaluatedModel(
        model,
        tokenizer_of(model, workdir),
        process=saved.process,
        trained_here=True,
        parameters=f"{'last' if last else 'averaged (EMA)'}, step {run.step}",
        answer_length=saved.data.answer_length or None,
        window=saved.block.window or None,
    )


def _journal(path: files.Path) -> Journal:
    """Answers of before, the same in all processes, of which process 0 alone writes new ones."""
    journal = Journal(path) if distributed.is_first() else Journal()
    journal.answers.update(distributed.from_first(journal.answers))
    return journal


def run(
    workdir: files.Path | None,
    source: str | None,
    config: ConfigDict | None,
    to: str | None,
    *,
    last: bool,
    template: bool | None,
    dtype: str | None,
    moved: str | None,
    given: dict[str, Any],
    show: Callable[[str], None],
) -> int:
    """Evaluate by the flags of this file; returns the exit status. ValueError for bad input."""
    if _COMPARE.value:
        if len(_COMPARE.value) != 2 or _TASKS.value:
            raise ValueError("--compare=FIRST.json,SECOND.json takes two results and no --tasks")
        show(compare_results(*_COMPARE.value))
        return 0
    if not _TASKS.value:
        raise ValueError("name the tasks: --tasks=gsm8k,hellaswag; own ones with --include_path")
    from mdm_jax.evaluation import harness  # needs lm-eval

    chosen = settings(_SETTINGS.value, given)
    if _TRIES.value > 1 and not chosen.temperature:
        raise ValueError("--tries: without --temperature all answers to a prompt are the same")
    if workdir is None:
        model = hub.load(source, dtype=dtype, mesh=sharding.make_mesh(fsdp=_SHARDS.value))
        subject, folder = harness.subject_of(model), files.as_path(f"eval/{model.directory.name}")
    else:
        subject, folder = subject_of_run(workdir, config, last, moved), workdir / "eval"
    folder = files.as_path(to) if to else folder
    if files.is_remote(folder):
        raise ValueError(f"--to: {folder} is in a bucket, where nothing can be appended")
    journal = _journal(folder / "requests.jsonl")
    if journal.torn:
        show(journal.torn)
    answerer = Answerer(
        subject,
        chosen,
        journal,
        batch=_BATCH.value,
        stream=_STREAM.value,
        progress=distributed.is_first(),
    )
    known = len(journal.answers)
    try:
        results, records = harness.run_tasks(
            answerer,
            _TASKS.value,
            include_path=_INCLUDE.value,
            limit=_LIMIT.value,
            num_fewshot=_FEWSHOT.value,
            repeats=_TRIES.value,
            template=bool(template),
        )
    except KeyboardInterrupt:
        if jax.process_count() > 1:
            raise
        answered = len(journal.answers) - known
        print(f"\nstopped; {answered} answers are kept in {journal.path}, and the same command "
              "line goes on from there", file=sys.stderr)  # fmt: skip
        return 130
    show(audit_line(results["audit"]))
    show("\n".join("  ".join(row) for row in result_rows(results)))
    if not distributed.is_first():
        return 0
    stem = "-".join(_TASKS.value)[:80].replace("/", "_")
    paths = new_files(folder, stem, ".json", ".jsonl", ".html")
    with writing(folder):
        files.write_json(paths[0], results)
        files.write(paths[1], "".join(files.json_line(record) for record in records))
        write_failures(paths[2], results, records)
    show(f"results: {paths[0]}\nevery document: {paths[1]}\nfailures: {paths[2]}")
    return 0
