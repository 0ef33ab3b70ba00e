"""The modes ``evaluate`` and ``sample``, and the report that ends a training run."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mdm_jax import data, distributed, evaluation, files, likelihood, plots, rng, training
from mdm_jax.evaluation.accuracy import measure_task_accuracy
from mdm_jax.launch.alignment.settings import PREFERENCES
from mdm_jax.launch.alignment.validation import final_figures
from mdm_jax.launch.build import Experiment, load_parameters, make_experiment
from mdm_jax.launch.families import number
from mdm_jax.launch.modes.sample import free_canvases, show_samples
from mdm_jax.launch.reports.curves import SIZE, is_exact, level_lines, training_curves
from mdm_jax.launch.reports.page import write_page
from mdm_jax.launch.reports.writers import reopen_writer
from mdm_jax.launch.sampling.options import Options, rows_and_watcher
from mdm_jax.launch.sampling.quality import check_quality
from mdm_jax.launch.sampling.watch import in_batches
from mdm_jax.launch.spacing.stored import stored_generator
from mdm_jax.launch.workdir import new_files, saved_config, write_json, writing
from mdm_jax.progress import progress_bar
from mdm_jax.training.metrics import MetricWriter
from mdm_jax.types import Array, Batch, PyTree

Check = Callable[..., None] | None


def evaluate(
    experiment: Experiment,
    workdir: files.Path,
    check: Check = None,
    show: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Bound and, with a checker, accuracy of the best parameters; also in ``evaluation.json``.

    ``check`` is called after every batch; may raise. ``show`` is called with the results before
    they are written, so that a full or read-only disk does not lose them.
    """
    max_rows = experiment.config.evaluate.max_rows
    step, params = load_parameters(experiment, workdir)
    split, source = experiment.held_out
    rows = min(max_rows or len(source), len(source))
    with _progress_bar(rows, f"evaluating {split}", check) as progress:
        batches = experiment.batches(source, max_rows)
        result = experiment.evaluate(params, experiment.key(0, "final"), batches, progress)
    record = {
        "step": step,
        "split": split,
        "unit": experiment.dataset.unit,
        "data_fingerprint": experiment.dataset.fingerprint,
        "design": getattr(result, "design", ""),
        "tokenizer_fingerprint": getattr(experiment.dataset.tokenizer, "fingerprint", None),
        **_entropies(experiment, split),
        **experiment.family.record(result),
        **_audit(experiment, step, result, experiment.batches(source, max_rows)),
        **measure_accuracy(experiment, workdir, params, check),
        **_of_alignment(experiment, workdir, params, check),
    }
    show(record)
    if distributed.is_first():
        with writing(workdir / "evaluation.json"):
            write_json(workdir / "evaluation.json", record)
    return record


def _entropies(experiment: Experiment, split: str) -> dict[str, float | None]:
    """Of the ``split`` evaluated and, where it is another, of validation; None for tables."""
    dataset, max_rows = experiment.dataset, experiment.config.evaluate.max_rows
    splits = {"": experiment.held_out[1]}
    if split != "valid" and len(dataset.valid):
        splits["valid_"] = dataset.valid
    found: dict[str, float | None] = {}
    for prefix, source in splits.items():
        names = [f"{prefix}{name}_bits_per_unit" for name in ("unigram", "bigram")]
        values: tuple[float | None, ...] = (None, None)
        if not dataset.columns:
            size, together = dataset.vocab_size, data.gather_together
            own = data.split_entropies(source, size, max_rows or None, together)
            values = own.unigram_per_unit, own.bigram_per_unit
        found |= dict(zip(names, values))
    return found


def _audit(
    experiment: Experiment, step: int, result: Any, batches: Iterable[Batch]
) -> dict[str, Any]:
    """What the bound is of, and how it was estimated; {} for pictures' own process."""
    if experiment.family.estimator is None:
        return {}
    c, tokenizer = experiment.config, experiment.dataset.tokenizer
    ids = {} if tokenizer is None else {"EOS": tokenizer.eos_id, "padding": tokenizer.pad_id}
    audit = {
        "scored": likelihood.scored_tokens(((b.tokens, b.eligible) for b in batches), ids),
        "design": result.design,
        "draws": f"{result.replicates} replicates of {result.passes} passes",
        "parameters": f"of step {step}, averaged (EMA {c.optimizer.ema_decay:g})",
        "dtype": c.model.dtype,
    }
    return {"audit": audit}


def measure_accuracy(
    experiment: Experiment, workdir: files.Path, params: PyTree, check: Check = None
) -> dict[str, Any]:
    """Accuracy on ``sample.num_answers`` prompts of the final split; {} without a checker.

    Along the grid that ``mdm spacing`` stored in the run, if any.
    """
    c, dataset = experiment.config, experiment.dataset
    if dataset.check is None:
        return {}
    split, source = experiment.held_out
    rows = min(c.sample.num_answers or len(source), len(source))
    generate, grid = stored_generator(experiment, workdir, c.sample.num_steps)
    with _progress_bar(rows, f"answering {split}", check) as progress:
        accuracy = measure_task_accuracy(
            generate,
            params,
            experiment.key(0, "answers"),
            data.evaluation_batches(
                source, min(c.evaluate.batch_size, rows), rows, data.gather_together
            ),
            check=dataset.check,
            tokenizer=dataset.tokenizer,
            progress=progress,
        )
    left_to_right = c.process == "autoregressive"
    return {
        **accuracy.to_dict(),
        "answered_by": "next_token" if left_to_right else c.sample.sampler,
        "temperature": c.sample.temperature,
        "grid": grid,
    }


def _of_alignment(
    experiment: Experiment, workdir: files.Path, params: PyTree, check: Check
) -> dict[str, Any]:
    """Held-out preferences, or rewards, of a run that trains on them."""
    if not experiment.config.alignment.method:
        return {}
    generate, _ = stored_generator(experiment, workdir, experiment.config.sample.num_steps)
    (split, source), c = experiment.held_out, experiment.config
    if c.alignment.method in PREFERENCES:  # both answers of each pair
        rows, what = 2 * min(c.evaluate.max_rows or len(source), len(source)), "preferences"
    else:
        rows, what = min(c.sample.num_answers or len(source), len(source)), "rewards"
    with _progress_bar(rows, f"{what}, {split}", check) as progress:
        return final_figures(experiment, workdir, params, generate, progress)


@contextlib.contextmanager
def _progress_bar(rows: int, description: str, check: Check) -> Iterator[Callable[[int], None]]:
    """A bar over ``rows`` in process 0; gives ``progress(count)``, which also calls ``check``."""
    silent = not distributed.is_first()
    with progress_bar(rows, description, "rows", silent=silent) as bar:

        def progress(count: int) -> None:
            bar.update(min(count, rows - bar.n))
            if check is not None:
                check()

        yield progress


def sample(
    experiment: Experiment,
    workdir: files.Path,
    show: Callable[[str], None] = lambda _: None,
    writer: MetricWriter | None = None,
    asked: Options | None = None,
) -> dict[str, Any]:
    """Draw samples under the best parameters; shown, written to ``samples/`` and returned.

    ValueError for what the run cannot write.
    """
    asked = asked or Options()
    jobs, watcher = rows_and_watcher(experiment, asked)
    step, params = load_parameters(experiment, workdir)
    watch = watcher and (watcher.show, experiment.mesh.size == 1)
    steps = experiment.config.sample.num_steps
    generate, grid = stored_generator(experiment, workdir, steps, watch)
    if grid:
        show(f"grid: {grid}")
    seed = experiment.config.seed if asked.seed is None else asked.seed
    key = rng.stream(rng.step_key(seed, step), "sample")
    generate = in_batches(generate, experiment.config.evaluate.batch_size, watcher)
    options = {"writer": writer, "show": show, "colour": asked.colour}
    options["degraded"] = experiment.family.degraded
    drawn = show_samples(experiment.dataset, jobs, generate, workdir, step, params, key, **options)
    if watcher is not None:
        drawn["files"] += watcher.write()
    if experiment.config.sample.quality_steps:
        drawn["files"] += measure_quality(experiment, workdir, step, params, key)
    return drawn


def measure_quality(
    experiment: Experiment, workdir: files.Path, step: int, params: PyTree, key: Array
) -> list[str]:
    """Quality of ``sample.quality_texts`` texts at each number of steps; returns the files.

    Each measurement is a new JSON file below ``workdir/quality``; the plot compares all of them.
    With ``sample.judge``, the directory of another run over the same tokens (autoregressive, for an
    exact likelihood), generative perplexity is measured under its parameters.
    """
    check_quality(experiment.config, experiment.dataset, experiment.family)
    c, dataset = experiment.config.sample, experiment.dataset
    directory, first = workdir / "quality", distributed.is_first()
    _, source = experiment.held_out

    def texts(tokens: np.ndarray, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        apart = data.unpacked(tokens, documents, dataset.tokenizer.eos_id)
        return tuple(values[: c.quality_texts] for values in apart)

    rows = data.gather(source, np.arange(min(c.quality_texts, len(source))))
    held_out, valid = texts(rows.tokens, rows.documents)
    score = judge_score(experiment, c.judge) if c.judge else None
    canvas, documents = free_canvases(dataset, c.quality_texts)
    paths = []
    with progress_bar(len(c.quality_steps), "quality", "settings", silent=not first) as bar:
        for count in c.quality_steps:
            generate, grid = stored_generator(experiment, workdir, count)
            tokens = generate(params, key, canvas, documents)
            quality = evaluation.measure_text_quality(
                *texts(tokens, documents), held_out=held_out, held_out_valid=valid, score=score
            )
            record = {"sampler": c.sampler, "num_steps": count, "step": step, "judge": c.judge}
            record |= {"grid": grid}
            if first:
                paths += new_files(directory, f"{c.sampler}-{count}", ".json")
                with writing(paths[-1]):
                    write_json(paths[-1], record | {"quality": quality.to_dict()})
            bar.update()
    reference = evaluation.measure_text_quality(held_out, valid, score=score)
    paths.append(directory / "quality.png")
    if first:
        found = (path for path in sorted(directory.glob("*.json")) if files.size(path))
        records = [files.read_json(path) for path in found]  # others may be writing empty ones
        plots.write(plots.quality_by_steps(records, references=reference.to_dict()), paths[-1])
    return [str(path) for path in paths]


def judge_score(experiment: Experiment, judge: str) -> evaluation.Score:
    """The score of the run ``judge``; ValueError if its rows have another length."""
    config = saved_config(judge)
    config.sample.update(judge="", prompts="")  # the judge's own, which may be gone
    other = make_experiment(config, files.as_path(judge))
    if other.dataset.length != experiment.dataset.length:
        raise ValueError(
            f"sample.judge: {judge} was trained on rows of {other.dataset.length} tokens, this run "
            f"on rows of {experiment.dataset.length}"
        )
    _, params = load_parameters(other, files.as_path(judge))
    return evaluation.likelihood_score(other.evaluate, params, other.key(0, "judge"))


# --- the report -----------------------------------------------------------------------------------


def report(
    experiment: Experiment,
    workdir: files.Path,
    check: Check = None,
    show: Callable[[str], None] = lambda _: None,
) -> str:
    """Evaluate, sample, plot; returns the text that ends a training run.

    ``show`` is called with each part of the text before it is written.
    """
    parts: list[str] = []

    def add(text: str) -> None:
        parts.append(text)
        show(text)

    def add_results(record: dict[str, Any]) -> None:
        exact = is_exact(experiment.config)
        add(format_results(record, details(experiment, record), exact))

    record = evaluate(experiment, workdir, check, show=add_results)
    with contextlib.closing(reopen_writer(experiment.config, workdir)) as writer:
        writer.show(record["step"], record["split"], _scores(record))
        drawn = sample(experiment, workdir, add, writer)
    paths = drawn["files"]
    if not distributed.is_first():
        return ""
    exact, (_, held_out) = is_exact(experiment.config), experiment.held_out
    add(summary(experiment.dataset, held_out, record, drawn["samples"], exact))
    shown = write_plots(workdir, experiment.config, record)
    page = write_page(workdir)
    add(
        "\n".join(
            [
                f"report:      {page}",
                f"samples:     {', '.join(paths)}",
                f"plots:       {', '.join(map(str, shown))}",
                f"TensorBoard: tensorboard --logdir {workdir / 'tensorboard'}",
                f"metrics:     {workdir / 'metrics.jsonl'}",
                f"checkpoint:  {workdir / 'checkpoints'}",
            ]
        )
    )
    with writing(workdir / "report.txt"):
        text = "\n".join(parts)
        files.write(workdir / "report.txt", f"{experiment.describe()}\n\n{text}\n")
    return text


def format_results(record: Mapping[str, Any], details: Sequence[str], exact: bool) -> str:
    """A record of :func:`evaluate` for the terminal; ``exact``: no bound."""
    unit, rows = record["unit"], number(record["data_standard_error_bits_per_unit"])
    value, kind = f"{record['bits_per_unit']:.3f}", "exact likelihood"
    errors = f"(± {rows} over rows)"
    if not exact:
        value += f" ± {number(record['standard_error_bits_per_unit'])}"
        kind, errors = "likelihood bound", f"(± Monte Carlo; over rows ± {rows})"
    return "\n".join(
        [
            f"held-out {kind} ({record['split']} split, {record['rows']} rows, "
            f"parameters of step {record['step']}):",
            f"  {value} bits per {unit}   {errors}",
            f"  unigram entropy of the split {number(record['unigram_bits_per_unit'])}, "
            f"bigram entropy {number(record['bigram_bits_per_unit'])} bits per {unit}",
            *details,
            "",
        ]
    )


def details(experiment: Experiment, record: dict[str, Any]) -> list[str]:
    """Report lines about a record of :func:`evaluate`: those of the process, bits by level."""
    return experiment.family.details(record) + level_lines(experiment.config, record)


_WORDS_FROM = 2**22
"""Most tokens of the training split whose words count as known, in evenly spaced rows."""


def summary(
    dataset: data.Dataset,
    held_out: data.RowSource,
    record: Mapping[str, Any],
    samples: Sequence[Mapping[str, str]],
    exact: bool,
) -> str:
    """The likelihood and, for texts of words, the share of the free samples' words that are known.

    ``record`` of :func:`evaluate` on the rows ``held_out``, ``exact`` if it is no bound;
    ``samples`` of :func:`sample`.
    """
    value = f"{record['bits_per_unit']:.3f}"
    if not exact:
        value += f" ± {number(record['standard_error_bits_per_unit'])}"
    lines = [f"held-out {record['split']} split: {value} bits per {record['unit']}"]
    free = [sample["text"] for sample in samples if sample["kind"] == "free"]
    if any(map(evaluation.words_of, free)):
        rows = evaluation.texts_of_rows(dataset.train, dataset.tokenizer, _WORDS_FROM)
        tokens = dataset.report.get("train_tokens", len(dataset.train) * dataset.length)
        whole = tokens <= _WORDS_FROM  # windows overlap, and evenly spaced ones hold every token
        text = "the training text" if whole else f"{_WORDS_FROM:,} tokens of the training text"
        known = {word for text in rows for word in evaluation.words_of(text)}
        found = evaluation.word_share(free, known)
        texts = evaluation.texts_of_rows(held_out, dataset.tokenizer)
        lines.append(
            f"free samples: {found.share:.0%} of {found.words} words occur in {text} "
            f"({found.distinct} different ones); of held-out text "
            f"{evaluation.word_share(texts, known).share:.0%}"
        )
    return "\n".join([*lines, ""])


def _scores(record: Mapping[str, Any]) -> dict[str, float]:
    """The final scores, under names that the metrics have."""
    fields = {
        "loss": "nats_per_element",
        "bits_per_unit": "bits_per_unit",
        "bits_per_unit_standard_error": "standard_error_bits_per_unit",
        "perplexity": "perplexity",
        "accuracy": "accuracy",
        "preference_accuracy": "preference_accuracy",
        "reward": "reward",
    }
    return {name: record[own] for name, own in fields.items() if record.get(own) is not None}


def write_plots(
    workdir: files.Path, config: Mapping[str, Any], record: Mapping[str, Any]
) -> list[files.Path]:
    """Plot the metrics, and the levels of a record of :func:`evaluate`; returns the files."""
    records, shown = training.read_metrics(workdir / "metrics.jsonl"), []
    for curve in training_curves(config, records, record):
        shown.append(workdir / "plots" / f"{curve.name}.png")
        with writing(shown[-1].parent):
            plots.save(curve.draw, shown[-1], SIZE)
    return shown
