"""Samples for people: free text, infilled passages, answers to prompts, pictures."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from mdm_jax import data, distributed, plots
from mdm_jax.launch.experiment import Experiment, is_conditional
from mdm_jax.training.metrics import MetricWriter
from mdm_jax.types import Array, Batch, PyTree

MASK_TEXT = "▁"


def prepare_samples(experiment: Experiment) -> Callable:
    """The generator of the configured sampler.

    Raises:
        ValueError, OSError: if a setting of ``sample``, or the file of prompts, cannot be used.
    """
    if experiment.config.sample.num_samples < 1:
        raise ValueError(
            f"sample.num_samples must be at least 1, got {experiment.config.sample.num_samples}"
        )
    if experiment.dataset.tokenizer is not None:
        _text_jobs(experiment)
    return experiment.generator()


def show_samples(
    experiment: Experiment,
    workdir: pathlib.Path,
    step: int,
    params: PyTree,
    key: Array,
    writer: MetricWriter | None = None,
    generate: Callable | None = None,
) -> dict[str, Any]:
    """Draws samples and writes them below ``workdir/samples``, never over older ones.

    ``generate`` is a :func:`prepare_samples` from before, which need not be compiled again.

    Returns:
        {"samples": [record, ...], "files": [path, ...]}; a text record has "kind" ("free",
        "infilled", "answer" or "prompt"), "given" where something was, and "text".
    """
    directory = workdir / "samples"
    if distributed.is_first():
        directory.mkdir(parents=True, exist_ok=True)
    stem = distributed.from_first(
        _free_stem(directory, f"step-{step}") if distributed.is_first() else None
    )
    generate = generate or prepare_samples(experiment)
    if experiment.dataset.tokenizer is None:
        return _show_pictures(experiment, generate, params, key, directory / stem, step, writer)
    jobs = _text_jobs(experiment)
    canvas = np.stack([job["canvas"] for job in jobs])
    documents = np.stack([job["documents"] for job in jobs])
    tokens = distributed.to_host(generate(params, key, canvas, documents))
    records = [_text_record(job, row, experiment.dataset) for job, row in zip(jobs, tokens)]
    lines, text = directory / f"{stem}.jsonl", directory / f"{stem}.txt"
    if distributed.is_first():
        lines.write_text(
            "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8"
        )
        text.write_text(format_samples(records), "utf-8")
    if writer is not None:
        writer.text(step, "samples", format_samples(records))
    return {"samples": records, "files": [str(lines), str(text)]}


def format_samples(records: list[dict[str, str]]) -> str:
    """Text records as a person reads them."""
    parts = []
    for record in records:
        parts.append(f"--- {record['kind']} ---")
        parts += [f"[{name}] {record[name]}" for name in ("given", "original") if name in record]
        parts.append(record["text"])
    return "\n".join(parts) + "\n"


def _text_jobs(experiment: Experiment) -> list[dict[str, Any]]:
    c, dataset = experiment.config.sample, experiment.dataset
    if c.prompts:
        return _prompt_jobs(pathlib.Path(c.prompts), dataset)
    _, source = experiment.held_out(experiment.config.evaluate.final_split)
    if is_conditional(dataset):
        chosen = np.arange(min(c.num_samples, len(source)))
        return [_fill_in_job("answer", source[int(i)], None, dataset) for i in chosen]
    blank = np.full(dataset.length, dataset.mask_id, np.int32)
    whole = np.ones(dataset.length, np.int32)
    jobs = [{"kind": "free", "canvas": blank, "documents": whole}] * c.num_samples
    if c.gap:
        jobs.append(_fill_in_job("infilled", source[len(source) // 2], c.gap, dataset))
    return jobs


def _fill_in_job(kind: str, row: Batch, gap: int | None, dataset: data.Dataset) -> dict[str, Any]:
    """A held-out row with its eligible tokens, or ``gap`` of them in the middle, masked."""
    places = np.flatnonzero(row.eligible)
    if gap is not None:
        if not 0 < gap <= len(places):
            raise ValueError(f"sample.gap must be in [0, {len(places)}], got {gap}")
        start = (len(places) - gap) // 2
        places = places[start : start + gap]
    canvas = np.array(row.tokens)
    canvas[places] = dataset.mask_id
    return {"kind": kind, "canvas": canvas, "documents": row.documents, "original": row.tokens}


def _prompt_jobs(path: pathlib.Path, dataset: data.Dataset) -> list[dict[str, Any]]:
    jobs = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        pieces = [dataset.tokenizer.encode(piece) for piece in line.split(MASK_TEXT)]
        mask = np.array([dataset.mask_id], np.int32)
        canvas = np.concatenate([a for piece in pieces for a in (piece, mask)][:-1])
        if len(canvas) > dataset.length:
            raise ValueError(
                f"{path}:{number}: {len(canvas)} tokens do not fit a row of {dataset.length}; "
                "shorten the line"
            )
        rest = np.full(dataset.length - len(canvas), dataset.mask_id, np.int32)
        whole = np.ones(dataset.length, np.int32)
        canvas = np.concatenate([canvas, rest])
        jobs.append({"kind": "prompt", "canvas": canvas, "documents": whole})
    if not jobs:
        raise ValueError(f"{path}: the file is empty; write one prompt a line")
    return jobs


def _text_record(job: dict[str, Any], row: np.ndarray, dataset: data.Dataset) -> dict[str, str]:
    shown = job["documents"] > 0
    decode = dataset.tokenizer.decode
    record = {"kind": job["kind"], "text": decode(row[shown], mask_text=MASK_TEXT)}
    if np.any(job["canvas"][shown] != dataset.mask_id):
        record["given"] = decode(job["canvas"][shown], mask_text=MASK_TEXT)
    if "original" in job:
        record["original"] = decode(job["original"][shown])
    return record


def _show_pictures(experiment, generate, params, key, stem, step, writer) -> dict[str, Any]:
    dataset = experiment.dataset
    count = experiment.config.sample.num_samples
    canvas = np.full((count, dataset.length), dataset.mask_id, np.int32)
    tokens = distributed.to_host(generate(params, key, canvas, np.ones_like(canvas)))
    pictures = tokens.reshape(count, *dataset.event_shape) / (dataset.mask_id - 1)
    image = plots.picture_grid(pictures)
    path = stem.with_suffix(".png")
    if distributed.is_first():
        plots.save(lambda axes: plots.picture(axes, image), path, (4, 4))
    if writer is not None:
        writer.image(step, "samples", image)
    return {"samples": [], "files": [str(path)]}


def _free_stem(directory: pathlib.Path, stem: str) -> str:
    taken = {path.stem for path in directory.iterdir()}
    number, name = 1, stem
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    return name
