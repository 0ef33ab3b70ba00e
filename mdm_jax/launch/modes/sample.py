"""Samples: free text, infilled passages, answers to prompts, pictures."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from mdm_jax import data, distributed, files, plots, samplers
from mdm_jax.launch.sampling.marks import marked, parts
from mdm_jax.launch.sampling.requests import (
    MASK_TEXT,
    Request,
    Rows,
    check_known,
    lay_out,
    line_request,
    read_requests,
    rows_of,
)
from mdm_jax.launch.workdir import new_files, writing
from mdm_jax.samplers.filters import check_finite
from mdm_jax.training.metrics import MetricWriter
from mdm_jax.types import Array, Batch, PyTree

_ROWS_SHOWN = 10
"""Of a table, on the terminal."""


class Job(NamedTuple):
    """A row to complete.

    ``kind``: "free", "infilled" (a held-out passage), "answer" (to a held-out prompt), "picture",
    or of a request, "free", "prompt" or "infill". ``canvas`` [L] tokens, masked where to generate;
    ``documents`` [L], 0 outside the text; ``original`` [L], the held-out row of the canvas, if any;
    ``request``, its ``number`` and that of its ``sample``, both from 1.
    """

    kind: str
    canvas: np.ndarray
    documents: np.ndarray
    original: np.ndarray | None = None
    request: Request | None = None
    number: int = 0
    sample: int = 0

    @property
    def name(self) -> str:
        """Of a request, for errors; "" for others."""
        return f"{self.request.origin}, sample {self.sample}" if self.request else ""


def order(config: ConfigDict) -> dict[str, Any]:
    """In what order the process of a run writes, for :func:`make_jobs` and ``rows_of``."""
    size = {"autoregressive": 1, "block": config.block.size}.get(config.process)
    return {"left_to_right": config.process == "autoregressive", "block_size": size}


def pictures(config: ConfigDict, dataset: data.Dataset) -> dict[str, Any]:
    """Which pictures a Gaussian run draws, for :func:`make_jobs`; nothing for other processes.

    ValueError for their settings in a run of another process.
    """
    c = config.sample
    if config.process != "gaussian":
        if c.classes or c.restore_from is not None:
            name = "classes" if c.classes else "restore_from"
            raise ValueError(f"sample.{name} is for process=gaussian, not {config.process!r}")
        return {}
    everything = range(dataset.num_classes) if config.gaussian.conditional else ()
    return {"classes": tuple(c.classes or everything), "restored": c.restore_from is not None}


def make_jobs(
    dataset: data.Dataset,
    source: data.RowSource,
    *,
    num_samples: int,
    gap: int,
    prompts: str,
    left_to_right: bool = False,
    block_size: int | None = None,
    classes: Sequence[int] = (),
    restored: bool = False,
) -> tuple[Job, ...]:
    """Rows to complete, from the settings of ``sample``; ValueError or OSError if unusable.

    Args:
        source: held-out rows.
        num_samples: free samples, or answers where rows have prompts.
        gap: length of the gap in the infilled passage, half of one that is shorter; 0 for none.
        prompts: file of requests in place of both (:func:`file_requests`); "" for none. Laid out as
            rows of the data are: a user's message, where these are conversations.
        left_to_right: whether the model ends a text by itself; if not, free samples have the
            lengths of training rows drawn at random.
        block_size: tokens that see each other, where later ones are not seen; None: all do.
        classes: of pictures, in turn; (): without.
        restored: whether pictures are held-out ones, which are restored from noise.
    """
    blank = np.full(dataset.length, dataset.mask_id, np.int32)
    everywhere = np.ones(dataset.length, np.int32)
    if dataset.tokenizer is None and restored:
        rows = data.gather(source, np.arange(num_samples) % len(source))
        return tuple(Job("picture", *row) for row in zip(rows.tokens, rows.documents, rows.tokens))
    if dataset.tokenizer is None:
        numbers = [2 + each for each in classes] or [1]
        named = (numbers[i % len(numbers)] * everywhere for i in range(num_samples))
        return tuple(Job("picture", blank, each) for each in named)
    if prompts:
        rows = rows_of(dataset, left_to_right, block_size)
        return request_jobs(file_requests(prompts, dataset.tokenizer), rows)
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
    colour: bool = False,
    degraded: Callable[..., np.ndarray] | None = None,
) -> dict[str, Any]:
    """Draw samples and write them below ``workdir/samples`` and to ``writer``; keeps older files.

    ``show`` is called with texts before they are written, so that a full disk does not lose them.
    ``generate(params, key, canvas, documents) -> tokens`` on the host. Returns {"samples": records,
    "files": paths}; a text record, one of each document, has "kind" (see :class:`Job`), "text" up
    to the EOS, and "given" for jobs with context. That of a request has what was asked, "answer" to
    a prompt, and "parts" of the text, given and generated by turns, given first. ``colour``: as
    shown, which files never are. ``degraded`` of the run's family: each restored picture is drawn
    right of the original and of the noisy one, and their errors are shown. ValueError that names
    the row if the model's logits are not finite.
    """
    directory, stem, paths = workdir / "samples", f"step-{step}", []
    canvas = np.stack([job.canvas for job in jobs])
    documents = np.stack([job.documents for job in jobs])
    tokens = generate(params, key, canvas, documents)
    if dataset.columns:
        text = data.as_csv(dataset.columns, tokens)
        show("".join(text.splitlines(keepends=True)[: _ROWS_SHOWN + 1]))
        if distributed.is_first():
            paths = new_files(directory, stem, ".csv")
            with writing(paths[0]):
                files.write(paths[0], text)
        return {"samples": [], "files": [str(path) for path in paths]}
    if dataset.tokenizer is None:
        sets = [tokens]
        if degraded is not None:
            sets = [canvas, degraded(key, canvas), tokens]
            ratios = [_peak_ratio(each, canvas, dataset.mask_id - 1) for each in sets[1:]]
            show(f"PSNR of noisy pictures {ratios[0]:.2f} dB, restored {ratios[1]:.2f} dB")
        shape, top = (len(jobs), *dataset.event_shape), dataset.mask_id - 1
        image = plots.picture_grid(np.concatenate([each.reshape(shape) / top for each in sets], 2))
        if distributed.is_first():
            paths = new_files(directory, stem, ".png")
            with writing(paths[0]):
                plots.save(lambda axes: plots.picture(axes, image), paths[0], (4, 4))
        if writer is not None:
            writer.image(step, "samples", image)
        return {"samples": [], "files": [str(path) for path in paths]}
    for number, (job, row) in enumerate(zip(jobs, tokens), start=1):
        check_finite(row, job.name or f"{job.kind} sample {number}")
    ids = dataset.tokenizer, dataset.mask_id
    records = [r for job, row in zip(jobs, tokens) for r in text_records(job, row, *ids)]
    text = format_samples(records)
    show(format_samples(records, colour) if colour else text)
    if distributed.is_first():
        paths = new_files(directory, stem, ".jsonl", ".txt")
        for path, content in zip(paths, (json_lines(records), text)):
            with writing(path):
                files.write(path, content)
    if writer is not None:
        writer.text(step, "samples", text)
    return {"samples": records, "files": [str(path) for path in paths]}


def _peak_ratio(tokens: np.ndarray, clean: np.ndarray, top: int) -> float:
    """Peak signal-to-noise ratio in decibels, of the mean square over all pictures."""
    error = np.mean(np.square((np.asarray(tokens, np.float64) - clean) / top))
    return float(-10 * np.log10(error)) if error else np.inf


def format_samples(records: list[dict[str, Any]], colour: bool = False) -> str:
    """Text records for the terminal, control characters as escapes.

    What was generated for a request is in ⟦⟧, or in ``colour``.
    """
    lines, several = [], len({record.get("request") for record in records}) > 1
    repeated = any(record.get("sample", 1) > 1 for record in records)
    for record in records:
        if "parts" in record:
            number = f" {record['request']}" * several + f", sample {record['sample']}" * repeated
            lines.append(f"--- {record['kind']}{number} ---")
            lines.append(marked(record["parts"], colour))
            continue
        lines.append(f"--- {record['kind']} ---")
        named = (name for name in ("given", "original") if name in record)
        lines += [data.printable(f"[{name}] {record[name]}") for name in named]
        lines.append(data.printable(record["text"]))
    return "\n".join(lines) + "\n"


def _infilling_job(row: Batch, gap: int, dataset: data.Dataset) -> Job:
    """A held-out row, ``gap`` tokens (half of a shorter text) in the middle of its text masked."""
    positions = np.flatnonzero(row.eligible & (row.tokens != dataset.tokenizer.eos_id))
    gap = gap if gap <= len(positions) else len(positions) // 2
    start = (len(positions) - gap) // 2
    canvas = np.array(row.tokens)
    canvas[positions[start : start + gap]] = dataset.mask_id
    return Job("infilled", canvas, row.documents, row.tokens)


def file_requests(path: str, codec: data.Tokenizer, length: int | None = None) -> Sequence[Request]:
    """Requests of a file of JSON lines (``.jsonl``), or of texts, one a line, each ▁ a token.

    ``length``: as of :class:`Request`, where the file states none. ValueError, naming file and
    line, for what cannot be read; characters of text files outside the vocabulary are a warning.
    """
    place = files.Path(path)
    if not place.is_file():
        raise ValueError(f"sample.prompts: {path} is no file; name one of texts or JSON lines")
    if place.suffix == ".jsonl":
        requests = read_requests(place, length)
        for request in requests:
            check_known(request, codec)
        return requests
    lines, dropped = data.read_lines(place)
    _warn(place, lines, dropped, codec)
    return [line_request(text, origin, length) for text, origin in lines]


def request_jobs(
    requests: Sequence[Request], rows: Rows, samples: int = 1, seed: int = 0
) -> tuple[Job, ...]:
    """``samples`` rows for each request; ``seed`` draws the lengths of those that state none.

    ValueError, naming its origin, for a request that does not fit.
    """
    rng = np.random.default_rng(seed)
    return tuple(
        Job(request.kind, *lay_out(request, rows, rng), None, request, number, sample)
        for number, request in enumerate(requests, start=1)
        for sample in range(1, samples + 1)
    )


def _warn(
    path: files.Path, lines: Sequence[Any], dropped: dict[str, int], codec: data.Tokenizer
) -> None:
    """Log what of a file of prompts the network does not get."""
    counts = [f"{n} {name.replace('_', ' ')} dropped" for name, n in dropped.items() if n]
    texts = ((text.replace(MASK_TEXT, ""), origin) for text, origin in lines)
    unknown = data.describe_unknown(texts, codec, len(lines))
    if distributed.is_first() and (counts or unknown):
        logging.warning("%s: %s", path, f"{', '.join(counts)}.{unknown}".removeprefix(". "))


def json_lines(records: Sequence[Mapping[str, Any]]) -> str:
    """Records as JSON, one a line; characters that cut lines for some readers are escapes too."""
    lines = (data.printable(json.dumps(record, ensure_ascii=False)) for record in records)
    return "".join(line + "\n" for line in lines)


def text_records(
    job: Job, row: np.ndarray, codec: data.Tokenizer, mask_id: int
) -> list[dict[str, Any]]:
    """A record of each document of which something was generated; the rest was not asked for."""
    records = []
    for number in np.unique(job.documents[(job.canvas == mask_id) & (job.documents > 0)]):
        shown = job.documents == number
        canvas, tokens = job.canvas[shown], row[shown]
        # EOS behind a text is no part of it.
        canvas = canvas[: np.flatnonzero(canvas != codec.eos_id)[-1] + 1]
        given = np.flatnonzero(canvas != mask_id)
        # The text ends with the first EOS after all that was given; one before that is shown.
        end = given[-1] + 1 if len(given) else 0
        tokens = np.append(tokens[:end], codec.truncate_at_eos(tokens[end : len(canvas)]))
        record = {"kind": job.kind}
        if job.request is not None:
            record |= {"request": job.number, "sample": job.sample, **dict(job.request.asked)}
            made = canvas[: len(tokens)] == mask_id
            pieces = parts(codec, tokens, made)
            if job.kind == "prompt":
                record["answer"] = "".join(pieces[1::2])
            record["parts"] = pieces
        record["text"] = codec.decode(tokens, mask_text=MASK_TEXT)
        if len(given):
            record["given"] = codec.decode(canvas, mask_text=MASK_TEXT)
        if job.original is not None:
            record["original"] = codec.decode(job.original[shown])
        records.append(record)
    return records
