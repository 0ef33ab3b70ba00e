"""The mode ``chat``: a conversation in the terminal that shows the canvas being unmasked."""

import contextlib
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import jax
import numpy as np

from mdm_jax import data, files, hub, models, samplers
from mdm_jax.data.tokenizers import Tokenizer, load_tokenizer
from mdm_jax.launch.sample import MASK_TEXT

_PROBE = "mdm"
_UP, _CLEAR = "\x1b[{}A", "\r\x1b[J"


def chat(
    model: hub.HubModel,
    codec: Tokenizer,
    *,
    max_tokens: int,
    steps: int | None,
    temperature: float,
    templated: bool,
) -> None:
    """Answer lines of standard input until it ends.

    Args:
        max_tokens, steps, temperature: of an answer, or steps of each block of a block model; None:
            one per token. The most confident tokens are filled in first.
        templated: turns are laid out by the tokenizer's chat template, and earlier ones are part of
            the prompt; else each line is a prompt of its own, as it stands.

    ValueError if the model cannot be decoded so, or has no chat template.
    """
    if model.traits.attention == "causal":
        raise ValueError(
            f"{model.family.name} is a causal model, which has no canvas; train it as masked "
            "or block diffusion first"
        )
    ends = {codec.eos_id} | (_end_of_turn(codec) if templated else set())
    canvas = _Canvas(model, codec, ends, max_tokens)
    turns: list[dict[str, str]] = []
    for number, line in enumerate(_lines()):
        turns = [*turns, {"role": "user", "content": line}] if templated else []
        try:
            if templated:
                prompt, turns = _fitted(model, codec, turns, max_tokens)
            else:
                prompt = codec.encode(line)
            canvas.begin(prompt)
            key = jax.random.fold_in(jax.random.key(0), number)
            tokens = _fill(model, codec, prompt, max_tokens, steps, temperature, key, canvas.show)
        except ValueError as error:
            if number == 0:  # as a rule the model or a setting
                raise
            print(f"error: {data.printable(str(error))}", file=sys.stderr, flush=True)
            turns = turns[:-1]
            continue
        answer = canvas.end(tokens)
        if templated:
            turns = [*turns, {"role": "assistant", "content": answer}]


def tokenizer_of(model: hub.HubModel, workdir: files.Path | None) -> Tokenizer:
    """The tokenizer of a model, or of its run; ValueError without one."""
    if model.tokenizer is not None:
        return model.tokenizer
    if workdir is None or not (workdir / "tokenizer.json").exists():
        raise ValueError(f"{model.directory or workdir} has no tokenizer to chat with")
    return load_tokenizer(workdir / "tokenizer.json")


class _Canvas:
    """The answer in the making on standard output, redrawn in place if that is a terminal."""

    def __init__(self, model: hub.HubModel, codec: Tokenizer, ends: set[int], max_tokens: int):
        self._codec, self._ends, self._most = codec, ends, max_tokens
        self._size = _block_size(model)
        self._out: TextIO = sys.stdout
        self._rows, self._last, self._skip = 0, "", 0

    def begin(self, prompt: np.ndarray) -> None:
        self._rows, self._last, self._skip = 0, "", _padded(len(prompt), self._size)

    def show(self, tokens: np.ndarray) -> None:
        """Draw tokens [1, ...] so far, from the prompt on."""
        row, mask = tokens[0], self._codec.mask_id
        if self._size > 1:  # what is before the prompt is masked
            row = row[np.argmax(row != mask) :] if np.any(row != mask) else row[:0]
        row = row[self._skip :][: self._most]
        text = self._text(np.append(row, np.full(self._most - len(row), mask, row.dtype)))
        if self._out.isatty():
            size = shutil.get_terminal_size()
            lines = _wrapped(text, size.columns)[-max(1, size.lines - 1) :]
            self._erase()
            self._out.write("\n".join(lines))
            self._rows = len(lines)
        elif text != self._last:
            self._out.write(text.replace("\n", "⏎") + "\n")
        self._last = text
        self._out.flush()

    def end(self, tokens: np.ndarray) -> str:
        """Draw the whole answer, which is returned as the model wrote it."""
        self._erase()
        self._out.write(self._text(tokens) + "\n")
        self._out.flush()
        return self._codec.decode(self._cut(tokens), mask_text="")

    def _erase(self) -> None:
        if self._rows:
            self._out.write((_UP.format(self._rows - 1) if self._rows > 1 else "") + _CLEAR)
        self._rows = 0

    def _cut(self, tokens: np.ndarray) -> np.ndarray:
        ends = np.flatnonzero(np.isin(tokens, list(self._ends)))
        return tokens[: ends[0]] if len(ends) else tokens

    def _text(self, tokens: np.ndarray) -> str:
        """Without power over the terminal."""
        text = self._codec.decode(self._cut(tokens), mask_text=MASK_TEXT)
        return data.printable(text).expandtabs()


def _fill(
    model: hub.HubModel,
    codec: Tokenizer,
    prompt: np.ndarray,
    count: int,
    steps: int | None,
    temperature: float,
    key: jax.Array,
    show: Callable[[np.ndarray], None],
) -> np.ndarray:
    """The ``count`` tokens after a prompt; ``show(tokens [1, ...])`` is called after each step."""
    size = _block_size(model)
    begin = _padded(len(prompt), size)
    row = np.full((1, begin + _padded(count, size)), codec.mask_id, np.int32)
    row[0, :begin] = codec.pad_id
    row[0, begin - len(prompt) : begin] = prompt
    documents = (np.arange(row.shape[1]) >= begin - len(prompt))[None].astype(np.int32)
    together = size if size > 1 else count
    steps = together if steps is None else min(steps, together)
    counts = [together // steps + (i < together % steps) for i in range(steps)]
    chosen = samplers.temperature(temperature)
    sampler = samplers.by_score(samplers.confidence, counts, token_filter=chosen)
    options = {"mask_id": codec.mask_id, "documents": documents}
    unused = getattr(codec, "unused_ids", ())

    def shown_step(context: Any, denoise: Any, state: Any) -> Any:
        state = sampler.step(context, denoise, state)
        parts = (state.tokens,) if context.before is None else (context.before, state.tokens)
        draw = lambda *parts: show(np.concatenate(parts, axis=1))  # noqa: E731
        jax.debug.callback(draw, *parts, ordered=True)
        return state

    shown = sampler._replace(step=shown_step)

    @jax.jit
    def run(params: Any, key: jax.Array) -> jax.Array:
        if size > 1:
            decoder = models.cached_block_decoder(model.model, size)
            decoder = decoder._replace(logits=models.without_tokens(decoder.logits, unused))
            given = options | {"prefix": begin}
            return samplers.sample_blocks(key, decoder, params, shown, None, row, **given)

        def network(tokens: jax.Array, _level: Any, _documents: Any) -> jax.Array:
            return model.family.logits(model.model, params, model.traits, tokens, None)

        apply = models.without_tokens(lambda _params, *inputs: network(*inputs), unused)
        if model.traits.shift:
            apply = models.shifted_apply(apply)
        return samplers.sample(
            key, lambda *inputs: apply(params, *inputs), shown, None, row, **options
        )

    tokens = np.asarray(run(model.params, key))
    jax.effects_barrier()
    return tokens[0, begin:][:count]


def _block_size(model: hub.HubModel) -> int:
    """Tokens that are filled together; 1 for all."""
    return model.traits.block_size if model.traits.attention == "block" else 1


def _padded(count: int, size: int) -> int:
    return -(-count // size) * size


def _end_of_turn(codec: Any) -> set[int]:
    """The token that ends what an assistant says, by the chat template."""
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    after = codec.encode(codec.render(said).text.rpartition(_PROBE)[2], special=True)
    return set(after[:1].tolist())


def _fitted(
    model: hub.HubModel, codec: Any, turns: list[dict[str, str]], max_tokens: int
) -> tuple[np.ndarray, list[dict[str, str]]]:
    """The prompt of a conversation, whose oldest turns go where it is too long for the model."""
    while True:
        prompt = codec.encode_chat(turns, add_generation_prompt=True).ids
        if len(turns) < 3 or len(prompt) + max_tokens <= (model.traits.length or np.inf):
            return prompt, turns
        turns = turns[2:]


def _lines() -> Iterator[str]:
    """Lines of standard input, with a prompt if it is a terminal; blank ones are passed over."""
    ask = "> " if sys.stdin.isatty() else ""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  editing and history of what is typed
    while True:
        try:
            line = input(ask)
        except EOFError:
            if ask:
                print()
            return
        if line.strip():
            yield line


def _wrapped(text: str, columns: int) -> list[str]:
    """Lines of a text as a terminal of that width breaks them."""
    lines = []
    for line in text.split("\n"):
        start = used = 0
        for i, character in enumerate(line):
            wide = 2 if unicodedata.east_asian_width(character) in "WF" else 1
            wide = 0 if unicodedata.combining(character) else wide
            if used + wide > columns - 1:  # the last column wraps here and there
                lines.append(line[start:i])
                start, used = i, 0
            used += wide
        lines.append(line[start:])
    return lines
