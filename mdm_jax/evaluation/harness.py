"""EleutherAI's lm-evaluation-harness over our models: the model class, tasks, and their results.

Needs the extra ``eval``. Importing this registers the model ``mdm_jax``, so that
``lm_eval.simple_evaluate("mdm_jax", "source=DIR,passes=32", tasks=...)`` works too.
"""

import collections
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mdm_jax import hub, sharding
from mdm_jax.checks import missing_package, unknown_name
from mdm_jax.estimates import standard_error_of_mean
from mdm_jax.evaluation.accuracy import repeated
from mdm_jax.evaluation.answering import Answer, Answerer, Journal
from mdm_jax.evaluation.model import EvaluatedModel
from mdm_jax.evaluation.settings import Settings

try:
    import datasets
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise missing_package("evaluation on tasks", "eval", error) from error


_PROBE = "mdm"


@register_model("mdm_jax")
class HarnessModel(LM):
    """Our models for lm-eval, by an ``answerer`` or from a directory of Hugging Face's layout.

    Args:
        source, journal: the directory or model id, and the file of answered requests; without an
            answerer.
        shards: devices that share the parameters of ``source``; rows go to the others too.
        batch_size: lm-eval's name for ``Settings.rows``.
        stream: of ``Answerer``.
        settings: of :class:`Settings`.
    """

    def __init__(
        self,
        answerer: Answerer | None = None,
        *,
        source: str = "",
        journal: str | None = None,
        dtype: str | None = None,
        shards: int | str = 1,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        stream: bool = False,
        **settings: Any,
    ):
        del max_batch_size, device  # JAX's own
        super().__init__()
        if answerer is None:
            if not source:
                raise ValueError("name the model: source=DIR, or an answerer")
            if batch_size:
                settings["rows"] = int(batch_size)
            model = hub.load(source, dtype=dtype, mesh=sharding.make_mesh(fsdp=int(shards)))
            answerer = Answerer(
                subject_of(model), Settings(**settings), Journal(journal), stream=stream
            )
        self.answerer = answerer

    @property
    def tokenizer_name(self) -> str:
        return self.answerer.subject.tokenizer.fingerprint

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        answers = self.answerer.likelihoods(
            [r.args for r in requests], _names(requests), _questions(requests)
        )
        _attach(requests, answers)
        return [(answer["log_likelihood"], answer["greedy"]) for answer in answers]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        answers = self.answerer.rolling([r.args[0] for r in requests], _names(requests))
        _attach(requests, answers)
        return [answer["log_likelihood"] for answer in answers]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        answers = self.answerer.continuations([r.args for r in requests], _names(requests))
        _attach(requests, answers)
        return [answer["text"] for answer in answers]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        codec = self.answerer.subject.tokenizer
        if not getattr(codec, "templates", None):
            raise ValueError("the tokenizer has no chat template: leave out --template")
        return codec.render(chat_history, add_generation_prompt).text

    @property
    def end_of_turn(self) -> str:
        """The token that ends what an assistant says, by the chat template."""
        said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        rest = self.apply_chat_template(said, False).rpartition(_PROBE)[2]
        codec = self.answerer.subject.tokenizer
        return codec.decode_literally(codec.encode(rest, special=True)[:1])

    def chat_template(self, chat_template: bool | str = False) -> str:
        name = chat_template if isinstance(chat_template, str) else "default"
        return getattr(self.answerer.subject.tokenizer, "templates", {}).get(name, "")


def subject_of(model: hub.HubModel) -> EvaluatedModel:
    """A model of others to evaluate; ValueError without a tokenizer."""
    if model.tokenizer is None:
        raise ValueError(f"{model.directory}: no tokenizer, so that no text can be evaluated")
    return EvaluatedModel(model, model.tokenizer)


def _names(requests: Sequence[Instance]) -> list[str]:
    return [f"task {r.task_name}, document {r.doc_id}" for r in requests]


def _questions(requests: Sequence[Instance]) -> list[tuple[str, int] | None]:
    """What each request is a choice of; None for documents some of whose contexts are empty: those
    of acc_mutual_info, whose choices are compared by another likelihood too."""
    documents = [(r.task_name, r.doc_id) for r in requests]
    left_out = {each for each, r in zip(documents, requests) if not r.args[0]}
    return [None if each in left_out else each for each in documents]


def _attach(requests: Sequence[Instance], answers: Sequence[Answer]) -> None:
    """Keep answers with their requests; a repeated request is one object."""
    for request in requests:
        request.answers = []
    for request, answer in zip(requests, answers):
        request.answers.append(answer)


# --- tasks ----------------------------------------------------------------------------------------


def load_tasks(names: Sequence[str], include_path: Sequence[str] = ()) -> list[Any]:
    """Task objects by name, of the folders ``include_path`` (subfolders too) and of lm-eval.

    Data files that a YAML names by a relative path are looked for in these folders; a data set of
    Hugging Face is taken from its folder there, as in ``INCLUDE_PATH/openai/gsm8k``.

    ValueError for an unknown name, with the nearest, and a task without data, which says what to
    download and where to put it.
    """
    folders = [pathlib.Path(folder) for folder in include_path]
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"include_path: there is no folder {folder}")
    manager = TaskManager(include_path=[*map(str, folders)], include_defaults=False)
    if any(name not in manager.all_tasks for name in names):
        manager = TaskManager(include_path=[*map(str, folders)])
    found = []
    for name in names:
        if name not in manager.all_tasks:
            near = unknown_name(name, manager.all_tasks, "task").args[0].partition("known: ")[0]
            where = ", ".join(map(str, folders)) or "none given"
            raise ValueError(
                f"{near}of {len(manager.all_tasks)} in lm-eval and include_path ({where})"
            )
        with _data_in(folders, name):
            made = manager.load([name])
        found += [*made["groups"].values()] or [*made["tasks"].values()]
    return found


@contextlib.contextmanager
def _data_in(folders: Sequence[pathlib.Path], task: str) -> Iterator[None]:
    """``datasets.load_dataset`` that looks into the folders first, and says what is missing."""
    original = datasets.load_dataset

    def found(path: str) -> str:
        known = [folder / path for folder in folders if (folder / path).exists()]
        return str(known[0]) if known and not os.path.isabs(path) else path

    def load(path: str, name: str | None = None, **options: Any) -> Any:
        local = options.get("data_files")
        if local:
            local = {"train": local} if isinstance(local, str) else dict(local)
            for split, file in local.items():
                local[split] = found(file) if isinstance(file, str) else [found(f) for f in file]
            options["data_files"] = local
        missing = [f for files in (local or {}).values()
                   for f in ([files] if isinstance(files, str) else files)
                   if "://" not in f and not pathlib.Path(f).exists() and "*" not in f]  # fmt: skip
        if missing:
            raise ValueError(
                f"task {task}: its data file {missing[0]} is missing; put it beside the task's "
                f"YAML in a folder of include_path ({', '.join(map(str, folders)) or 'none'})"
            )
        try:
            return original(found(path), name, **options)
        except Exception as error:
            if local:
                raise ValueError(
                    f"task {task}: {missing or local} cannot be read: {error}"
                ) from error
            raise ValueError(
                f"task {task}: its data, {path}{f' ({name})' if name else ''}, are not here "
                f"({type(error).__name__}). Where there is a net: hf download {path} --repo-type "
                f"dataset --local-dir DIR/{path}; then name DIR with --include_path"
            ) from error

    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = original


# --- results --------------------------------------------------------------------------------------


def run_tasks(
    answerer: Answerer,
    names: Sequence[str],
    *,
    include_path: Sequence[str] = (),
    limit: int | None = None,
    num_fewshot: int | None = None,
    repeats: int = 1,
    template: bool = False,
    bootstrap: int = 1000,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Results of tasks as JSON values, and a record of every document.

    Args:
        limit: the first documents of each task alone.
        num_fewshot: examples in a prompt; None: the task's own number.
        repeats: answers to each prompt of tasks that generate, for pass@k and majority vote; wants
            a temperature.
        template: prompts are rendered by the tokenizer's chat template.
        bootstrap: resamples for lm-eval's errors of means that are not plain.

    ValueError as :func:`load_tasks` and ``Answerer``.
    """
    tasks = load_tasks(names, include_path)
    if template:
        end = HarnessModel(answerer).end_of_turn
        answerer = dataclasses.replace(answerer, stops=(end,) if end else ())
    leaves = {
        leaf.task_name: leaf
        for task in tasks
        for leaf in (task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task])
    }
    for task in leaves.values():
        if repeats > 1 and task.OUTPUT_TYPE == "generate_until":
            task.set_config("repeats", repeats)
    found = lm_eval.simple_evaluate(
        model=HarnessModel(answerer),
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=template,
        bootstrap_iters=bootstrap,
        log_samples=True,
    )
    records, results = [], {}
    for name, task in leaves.items():
        own = _records(name, task, found["samples"][name])
        records += own
        results[name] = {
            "metrics": _metrics(found["results"][name]),
            "documents": found["n-samples"][name]["effective"],
            "of": found["n-samples"][name]["original"],
            "fewshot": found["n-shot"].get(name),
            "version": found["versions"].get(name),
            "data": _digest(
                sorted({(r["document"], r["doc_hash"], r["prompt_hash"]) for r in own})
            ),
            "requests": task.OUTPUT_TYPE,
            **_monte_carlo(task, own),
        }
        if repeats > 1 and task.OUTPUT_TYPE == "generate_until":
            results[name]["repeats"] = _repeated(task, repeats)
    groups = {name: _metrics(values) for name, values in found.get("groups", {}).items()}
    subject, settings = answerer.subject, answerer.settings
    return {
        "tasks": results,
        **({"groups": groups} if groups else {}),
        "audit": subject.audit(settings) | {"chat_template": template},
        "settings": dataclasses.asdict(settings),
        "model": subject.fingerprint,
        "tokenizer": subject.tokenizer.fingerprint,
        "lm_eval": importlib.metadata.version("lm_eval"),
    }, records


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()


def _metrics(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """{"acc,none": {"value": ..., "standard_error": ...}}; errors are lm-eval's, over documents."""
    metrics = {}
    for name, value in values.items():
        if not isinstance(value, int | float) or "," not in name or "_stderr," in name:
            continue
        metric, _, kind = name.partition(",")
        error = values.get(f"{metric}_stderr,{kind}")
        known = isinstance(error, int | float) and math.isfinite(error)
        metrics[name] = {"value": float(value), "standard_error": float(error) if known else None}
    return metrics


def _records(name: str, task: Any, samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A record of each document and filter."""
    requests = collections.defaultdict(list)
    for request in task.instances:
        requests[request.doc_id].append(request)
    records = []
    for sample in samples:
        own = sorted(requests[sample["doc_id"]], key=lambda request: request.idx)
        answers = [answer for request in own for answer in request.answers]
        record = {"task": name, "document": sample["doc_id"], "filter": sample["filter"]}
        record |= {"prompt": own[0].args[0], "target": sample["target"]}
        if task.OUTPUT_TYPE == "generate_until":
            record["answer"] = answers[0]["text"]
            record["answers"] = [answer["text"] for answer in answers[1:]]
            record["filtered"] = sample["filtered_resps"][0]
            record["steps"] = answers[0]["steps"]
        else:
            record["continuations"] = [r.args[-1] for r in own if len(r.args) > 1]
            record["log_likelihoods"] = [answer["log_likelihood"] for answer in answers]
            record["standard_errors"] = [answer["standard_error"] for answer in answers]
            record["passes"] = [answer["passes"] for answer in answers]
            if task.OUTPUT_TYPE == "multiple_choice":
                # Behind the choices: those without a context, of acc_mutual_info.
                mutual = "acc_mutual_info" in sample["metrics"]
                record["unsure"] = _unsure(answers[: len(answers) // (1 + mutual)])
        record["tokens"] = [answer["tokens"] for answer in answers]
        record["seconds"] = round(sum(answer["seconds"] for answer in answers), 4)
        record["metrics"] = {metric: sample[metric] for metric in sample["metrics"]}
        record |= {key: sample[key] for key in ("doc_hash", "prompt_hash")}
        records.append(json.loads(json.dumps(record, default=float)))
    return records


def _monte_carlo(task: Any, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the noise of likelihoods does to the metrics."""
    if task.OUTPUT_TYPE == "generate_until":
        return {}
    if task.OUTPUT_TYPE == "multiple_choice":
        unsure = [record["unsure"] for record in records]
        return {"monte_carlo": {"unsure_documents": None if None in unsure else sum(unsure)}}
    errors = [error for record in records for error in record["standard_errors"]]
    total = None if None in errors else math.hypot(*errors)
    found: dict[str, Any] = {"standard_error_nats": total}
    for metric, values in _pairs(records).items() if total is not None else ():
        nats, size = values.sum(0)
        scale = 1 / math.log(2) if metric == "bits_per_byte" else math.exp(-nats / size)
        found.setdefault("standard_errors", {})[metric] = total / size * scale
    return {"monte_carlo": found}


def _unsure(answers: Sequence[Answer]) -> bool | None:
    """Whether the likeliest choice is within two Monte Carlo standard errors of the next.

    Paired over replicates, whose noise choices have in common; None where unknown.
    """
    if any(answer["standard_error"] is None for answer in answers):
        return None
    first, *rest = sorted(answers, key=lambda answer: -answer["log_likelihood"])
    if not rest:
        return False
    pair = [answer["estimates"] for answer in (first, rest[0])]
    common = min((len(own) for own in pair if len(own) > 1), default=1)  # a width stops each alone
    margins = np.subtract(*(own[:common] for own in pair))  # one: exact
    return len(margins) > 1 and bool(margins.mean() <= 2 * standard_error_of_mean(margins))


def _pairs(records: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Metrics whose values are (log-likelihood, size), [documents, 2]."""
    names = {m for r in records for m, v in r["metrics"].items() if isinstance(v, list)}
    return {name: np.array([r["metrics"][name] for r in records], float) for name in sorted(names)}


def _repeated(task: Any, repeats: int) -> dict[str, Any]:
    """pass@k and majority vote by filter and metric, from each answer judged alone."""
    answers, credits = collections.defaultdict(list), collections.defaultdict(list)
    for request in task.instances:
        parts = [dataclasses.replace(request, resps=[r], filtered_resps={}) for r in request.resps]
        for ensemble in task._filters:
            ensemble.apply(parts)
            judged = [task.process_results(request.doc, [part.filtered_resps[ensemble.name]])
                      for part in parts]  # fmt: skip
            for metric, value in judged[0].items():
                if not isinstance(value, int | float | np.number | np.bool_):
                    continue  # of all documents together, as BLEU
                key = f"{metric},{ensemble.name}"
                answers[key].append([str(part.filtered_resps[ensemble.name]) for part in parts])
                credits[key].append([float(values[metric]) for values in judged])
    return {key: repeated(answers[key], np.array(credits[key]), repeats) for key in answers}
