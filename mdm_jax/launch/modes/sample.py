"""Samples: free text, infilled passages, answers to prompts, pictures."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from mdm_jax import data, distributed, files, plots, samplers
from mdm_jax.launch.workdir import new_files, writing
from mdm_jax.training.metrics import MetricWriter
from mdm_jax.types import Array, Batch, PyTree

MASK_TEXT = "▁"


class Job(NamedTuple):
    """A row to complete, of kind "free", "infilled", "answer", "prompt" or "picture".

    ``canvas`` [L] tokens, masked where to generate; ``documents`` [L], 0 outside the text;
    ``original`` [L], the held-out row of the canvas, if any.
    """

    kind: str
    canvas: np.ndarray
    documents: np.ndarray
    original: np.ndarray | None = None


def make_jobs(
    dataset: data.Dataset,
    source: data.RowSource,
    *,
    num_samples: int,
    gap: int,
    prompts: str,
    left_to_right: bool = False,
) -> tuple[Job, ...]:
    """Rows to complete, from the settings of ``sample``; ValueError or OSError if unusable.

    Args:
        source: held-out rows.
        num_samples: free samples, or answers where rows have prompts.
        gap: length of the gap in the infilled passage, half of one that is shorter; 0 for none.
        prompts: file of texts, one a line (:func:`mdm_jax.data.read_lines`), ▁ where a token
            is to be generated, in place of both; "" for none. Laid out as rows of the data are: a
            user's message, where these are conversations.
        left_to_right: whether the model ends a text by itself; if not, free samples have the
            lengths of training rows drawn at random.
    """
    blank = np.full(dataset.length, dataset.mask_id, np.int32)
    everywhere = np.ones(dataset.length, np.int32)
    if dataset.tokenizer is None:
        return (Job("picture", blank, everywhere),) * num_samples
    if prompts:
        return _prompt_jobs(files.Path(prompts), dataset, left_to_right)
    if dataset.layout is not None:
        rows = data.gather(source, np.arange(min(num_samples, len(source))))
        canvases = zip(*samplers.canvas_like(rows, dataset.mask_id), rows.tokens)
        return tuple(Job("answer", *canvas) for canvas in canvases)
    jobs = (Job("free", blank, everywhere),) * num_samples
    if not left_to_right:
        jobs = tuple(Job("free", *canvas) for canvas in zip(*free_canvases(dataset, num_samples)))
    if gap:
        jobs += (_infilling_job(source[len(source) // 2], gap, dataset),)
    return jobs


def free_canvases(dataset: data.Dataset, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Canvas and documents [count, L] of training rows drawn at random, all of them masked."""
    rows = np.random.default_rng(0).integers(len(dataset.train), size=count)
    return samplers.canvas_like(data.gather(dataset.train, rows), dataset.mask_id)


def adaptations(jobs: Sequence[Job], settings: Mapping[str, Any], mask_id: int) -> list[str]:
    """Lines about settings of demonstrations that the data are too small for."""
    lines = []
    for job in jobs:
        gap = int(np.sum(job.canvas == mask_id))
        if job.kind == "infilled" and gap < settings["gap"]:
            lines.append(
                f"sample.gap={settings['gap']} is longer than the infilled passage; its middle "
                f"{gap} tokens are left out instead"
            )
    answers = sum(job.kind == "answer" for job in jobs)
    if 0 < answers < settings["num_samples"]:
        lines.append(f"sample.num_samples={settings['num_samples']}: there are {answers} prompts")
    return lines


def show_samples(
    dataset: data.Dataset,
    jobs: Sequence[Job],
    generate: Callable[..., Array],
    workdir: files.Path,
    step: int,
    params: PyTree,
    key: Array,
    writer: MetricWriter | None = None,
    show: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Draw samples and write them below ``workdir/samples`` and to ``writer``; keeps older files.

    ``show`` is called with texts before they are written, so that a full disk does not lose them.
    ``generate(params, key, canvas, documents) -> tokens``. Returns {"samples": records, "files":
    paths}; a text record, one of each document, has "kind" (see :class:`Job`), "text" up to the
    EOS, and "given" for jobs with context.
    """
    directory, stem, paths = workdir / "samples", f"step-{step}", []
    canvas = np.stack([job.canvas for job in jobs])
    documents = np.stack([job.documents for job in jobs])
    tokens = distributed.to_host(generate(params, key, canvas, documents))
    if dataset.tokenizer is None:
        pictures = tokens.reshape(len(jobs), *dataset.event_shape) / (dataset.mask_id - 1)
        image = plots.picture_grid(pictures)
        if distributed.is_first():
            paths = new_files(directory, stem, ".png")
            with writing(paths[0]):
                plots.save(lambda axes: plots.picture(axes, image), paths[0], (4, 4))
        if writer is not None:
            writer.image(step, "samples", image)
        return {"samples": [], "files": [str(path) for path in paths]}
    records = [r for job, row in zip(jobs, tokens) for r in _text_records(job, row, dataset)]
    text = format_samples(records)
    show(text)
    if distributed.is_first():
        paths = new_files(directory, stem, ".jsonl", ".txt")
        # As JSON escapes too, so that no reader cuts a record at a U+2028 in it.
        printed = [data.printable(json.dumps(record, ensure_ascii=False)) for record in records]
        for path, content in zip(paths, ("".join(line + "\n" for line in printed), text)):
            with writing(path):
                files.write(path, content)
    if writer is not None:
        writer.text(step, "samples", text)
    return {"samples": records, "files": [str(path) for path in paths]}


def format_samples(records: list[dict[str, str]]) -> str:
    """Text records for the terminal, control characters as escapes."""
    parts = []
    for record in records:
        parts.append(f"--- {record['kind']} ---")
        parts += [f"[{name}] {record[name]}" for name in ("given", "original") if name in record]
        parts.append(record["text"])
    return data.printable("\n".join(parts)) + "\n"


def _infilling_job(row: Batch, gap: int, dataset: data.Dataset) -> Job:
    """A held-out row, ``gap`` tokens (half of a shorter text) in the middle of its text masked."""
    positions = np.flatnonzero(row.eligible & (row.tokens != dataset.tokenizer.eos_id))
    gap = gap if gap <= len(positions) else len(positions) // 2
    start = (len(positions) - gap) // 2
    canvas = np.array(row.tokens)
    canvas[positions[start : start + gap]] = dataset.mask_id
    return Job("infilled", canvas, row.documents, row.tokens)


def _prompt_jobs(path: files.Path, dataset: data.Dataset, left_to_right: bool) -> tuple[Job, ...]:
    if not path.is_file():
        raise ValueError(f"sample.prompts: {path} is no file; name one of texts, one a line")
    lines, dropped = data.read_lines(path)
    codec, layout, mask = dataset.tokenizer, dataset.layout, np.array([dataset.mask_id], np.int32)
    _warn(path, lines, dropped, codec)
    rng = np.random.default_rng(0)
    seen = data.gather(dataset.train, rng.integers(len(dataset.train), size=256)).documents
    if layout is not None and (left_to_right or np.all(seen[:, -1])):
        # The model ends answers by itself, or all of them end at the last position.
        layout = dataclasses.replace(layout, answer_padding="eos_scored")
    numbered = seen + (np.max(seen) + 1) * np.arange(len(seen))[:, None]
    sizes = np.unique(numbered[seen > 0], return_counts=True)[1]
    jobs = []
    for text, origin in lines:
        prompt, *rest = text.split(MASK_TEXT)
        encode_prompt = getattr(layout, "encode_prompt", codec.encode)
        pieces = [encode_prompt(prompt), *map(codec.encode, rest)]
        ids = np.concatenate([a for piece in pieces for a in (piece, mask)][:-1])
        try:
            if layout is not None:
                row = layout.to_answer(ids, codec)
                canvas, documents = row.tokens[0], row.documents[0]
            elif (needed := len(ids) + (dataset.mask_id not in ids)) > dataset.length:
                raise ValueError(
                    f"{len(ids)} tokens do not fit a row of {dataset.length} in which at least one "
                    "is generated"
                )
            else:
                # As long as a training document drawn at random from those with room for it.
                enough = sizes[sizes >= needed]
                size = dataset.length if left_to_right or not len(enough) else rng.choice(enough)
                documents = (np.arange(dataset.length) < size).astype(np.int32)
                canvas = np.where(documents, mask, codec.pad_id)
                canvas[: len(ids)] = ids
        except ValueError as error:
            raise ValueError(f"{origin}: {error}; change the line") from error
        jobs.append(Job("prompt", canvas, documents))
    return tuple(jobs)


def _warn(
    path: files.Path, lines: Sequence[Any], dropped: dict[str, int], codec: data.Tokenizer
) -> None:
    """Log what of a file of prompts the network does not get."""
    counts = [f"{n} {name.replace('_', ' ')} dropped" for name, n in dropped.items() if n]
    texts = ((text.replace(MASK_TEXT, ""), origin) for text, origin in lines)
    unknown = data.describe_unknown(texts, codec, len(lines))
    if distributed.is_first() and (counts or unknown):
        logging.warning("%s: %s", path, f"{', '.join(counts)}.{unknown}".removeprefix(". "))


def _text_records(job: Job, row: np.ndarray, dataset: data.Dataset) -> list[dict[str, str]]:
    """A record of each document of which something was generated; the rest was not asked for."""
    codec, records = dataset.tokenizer, []
    for number in np.unique(job.documents[(job.canvas == dataset.mask_id) & (job.documents > 0)]):
        shown = job.documents == number
        canvas, tokens = job.canvas[shown], row[shown]
        given = np.flatnonzero(canvas != dataset.mask_id)
        # The text ends with the first EOS after all that was given; one before that is shown.
        end = given[-1] + 1 if len(given) else 0
        tokens = np.append(tokens[:end], codec.truncate_at_eos(tokens[end:]))
        record = {"kind": job.kind, "text": codec.decode(tokens, mask_text=MASK_TEXT)}
        if len(given):
            record["given"] = codec.decode(canvas, mask_text=MASK_TEXT)
        if job.original is not None:
            record["original"] = codec.decode(job.original[shown])
        records.append(record)
    return records
