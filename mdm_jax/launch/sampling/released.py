"""Samples of a released model: words alone, neither data nor a config."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mdm_jax import data, files, hub
from mdm_jax.hub.decoding import lay_out, settle
from mdm_jax.launch.modes.chat import longest_answer, tokenizer_of
from mdm_jax.launch.modes.sample import (
    Job,
    file_requests,
    format_samples,
    json_lines,
    text_records,
)
from mdm_jax.launch.sampling import film
from mdm_jax.launch.sampling.options import Options
from mdm_jax.launch.sampling.requests import Request, check_known
from mdm_jax.launch.sampling.watch import Watcher
from mdm_jax.samplers.filters import check_finite


def sample(
    directory: str,
    asked: Options,
    *,
    steps: int | None = None,
    temperature: float | None = None,
    templated: bool = False,
    to: str | None = None,
    show: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Write what is asked of a masked or block model by its family's rule; shown and returned.

    Args:
        steps, temperature: in place of the rule's, as in ``hub.rules.Rule``.
        templated: a prompt is a user's message of the model's chat template; else as it stands.
        to: new file for the records, JSON lines.

    ValueError without a request, for one that the model cannot take, or names that are taken.
    """
    if to is not None and files.Path(to).exists():
        raise ValueError(f"--to={to} exists; name a new file for the records")
    if not asked.requests and not asked.prompts:
        raise ValueError("--source: say what to write, --prompt, --infill or --prompts=FILE")
    if asked.gif:
        film.check_path(asked.gif)  # before a large model is loaded
    model = hub.load(directory)
    codec = tokenizer_of(model, None)
    for request in asked.requests:
        check_known(request, codec)
    requests = asked.requests or file_requests(asked.prompts, codec, asked.length)
    watcher = None
    if asked.live or asked.gif:
        watcher = Watcher(codec, codec.mask_id, asked.live, asked.gif)
    given = {"steps": steps, "temperature": temperature}
    changes = {name: value for name, value in given.items() if value is not None}
    encode = codec.encode
    if templated:
        renderer = hub.ChatRenderer(codec)

        def encode(text: str) -> np.ndarray:
            return renderer.prompt([{"role": "user", "content": text}])

    records = []
    for number, request in enumerate(requests, start=1):
        key = jax.random.fold_in(jax.random.key(asked.seed or 0), number)
        try:
            rows = _rows(model, codec, request, encode, asked.count or 1, changes, key, watcher)
        except ValueError as error:
            raise ValueError(f"{request.origin}: {error}") from error
        for i, (canvas, documents, tokens) in enumerate(zip(*rows), start=1):
            job = Job(request.kind, canvas, documents, None, request, number, i)
            check_finite(tokens, job.name)
            records += text_records(job, tokens, codec, codec.mask_id)
    show(format_samples(records, asked.colour))
    paths = [] if to is None else [to]
    if to is not None:
        files.write(to, json_lines(records))
    if watcher is not None:
        paths += watcher.write()
    if paths:
        show(f"written to {', '.join(paths)}")
    return records


def _rows(
    model: hub.HubModel,
    codec: data.Tokenizer,
    request: Request,
    encode: Callable[[str], np.ndarray],
    count: int,
    changes: dict[str, Any],
    key: jax.Array,
    watcher: Watcher | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Canvases, what of them is no padding, and tokens [count, L] of a request."""
    head = encode(request.prompt) if request.prompt else np.empty(0, np.int32)
    ids = {"mask_id": codec.mask_id, "eos_id": codec.eos_id}
    if not request.gaps:
        new = request.length or longest_answer(model, len(head))
        _check_length(model, len(head) + new)
        ids["pad_id"] = codec.pad_id
        rule, known = settle(model, [head], new, None, changes, *ids.values())
        rule_ids = (known.mask, known.filler(rule))
        canvas, visible, _, columns = lay_out([head] * count, new, rule, *rule_ids)
        canvas, visible = canvas[:, columns], visible[:, columns]
        run = _watched(watcher, canvas, visible, columns)
        made = hub.generate(model, [head] * count, new, rule=rule, key=key, show=run, **ids)
    else:
        sizes = [gap or request.length for gap in request.gaps]
        if None in sizes:
            raise ValueError("no row says how much fits: write ▁▁5, or give --length")
        pieces = [head]
        for text, size in zip(request.texts, [*sizes, request.rest and request.length or 0]):
            pieces += [codec.encode(text), np.full(size, codec.mask_id, np.int32)]
        row = np.concatenate(pieces).astype(np.int32)
        _check_length(model, len(row))
        canvas = np.tile(row, (count, 1))
        visible = np.ones(canvas.shape, bool)
        run = _watched(watcher, canvas, visible, slice(None))
        made = hub.infill(model, [row] * count, key=key, show=run, **ids, **changes)
    jax.effects_barrier()
    if watcher is not None:
        watcher.end()
    return canvas, visible.astype(np.int32), np.asarray(made.tokens)


def _watched(
    watcher: Watcher | None, canvas: np.ndarray, visible: np.ndarray, columns: slice
) -> Callable[[np.ndarray], None] | None:
    if watcher is None:
        return None
    watcher.begin(canvas, visible.astype(np.int32))
    return lambda tokens: watcher.show(tokens[:, columns])


def _check_length(model: hub.HubModel, length: int) -> None:
    stated = model.traits.length
    if stated is not None and length > stated:
        raise ValueError(f"{length} tokens, but the model states at most {stated}; shorten it")
