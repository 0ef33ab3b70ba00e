"""The mode ``chat``: a conversation in the terminal that shows the canvas being unmasked."""

import contextlib
import math
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any, TextIO

import jax
import numpy as np

from mdm_jax import data, files, hub
from mdm_jax.data.tokenizers import Tokenizer, load_tokenizer
from mdm_jax.hub.decoding import generate
from mdm_jax.hub.rules import RULES
from mdm_jax.launch.modes.sample import MASK_TEXT

_PROBE = "mdm"
_MULTIPLE = 32  # tokens, that rows are padded to: prompts of most lengths share a program
_MOST, _STEP = 128, 16  # tokens of an answer, unless the model's length leaves fewer, in such steps
_UP, _CLEAR = "\x1b[{}A", "\r\x1b[J"


def chat(
    model: hub.HubModel,
    codec: Tokenizer,
    *,
    max_tokens: int | None,
    steps: int | None,
    temperature: float,
    templated: bool,
    trained_here: bool = False,
    window: int = 0,
) -> None:
    """Answer lines of standard input until it ends.

    Args:
        max_tokens, steps, temperature: of an answer; as in ``hub.rules.Rule``. ``max_tokens`` None:
            128, or what the model's stated length leaves.
        templated: turns are laid out by the tokenizer's chat template, or the plain one of runs
            here without, and earlier ones are part of the prompt; else each line is a prompt of its
            own, as it stands.
        trained_here: by an objective that never lets the mask token be predicted.
        window: blocks that a block attends to, itself included; 0: all.

    ValueError if the model cannot be decoded so, or has no chat template.
    """
    rule, codec_ends = _rule(model), {codec.eos_id}
    changes: dict[str, Any] = {"steps": steps, "temperature": temperature}
    if trained_here:
        changes["excludes_mask"] = True
    if window:
        size = model.traits.block_size
        changes |= {"block_size": size, "window": window * size}
    if templated:
        template = hub.ChatRenderer(codec)
        if trained_here and not getattr(codec, "templates", None):
            template = data.PlainTemplate(codec)
        else:
            codec_ends |= _end_of_turn(codec)
    ids = {"mask_id": codec.mask_id, "eos_id": codec.eos_id, "pad_id": codec.pad_id}
    canvas = _Canvas(model, codec, codec_ends, rule)
    turns: list[dict[str, str]] = []
    for number, line in enumerate(_lines()):
        turns = [*turns, {"role": "user", "content": line}] if templated else []
        try:
            if templated:
                prompt, turns = _fitted(model, template, turns, max_tokens)
            else:
                prompt = codec.encode(line)
            longest = max_tokens or _longest(model, len(prompt))
            multiple = _multiple(model, len(prompt) + longest)
            canvas.begin(prompt, longest, multiple)
            key = jax.random.fold_in(jax.random.key(0), number)
            options = ids | {"key": key, "show": canvas.show, "pad_multiple": multiple}
            made = generate(model, [prompt], longest, rule=rule, **options, **changes)
            jax.effects_barrier()
        except ValueError as error:
            if number == 0:  # as a rule the model or a setting
                raise
            print(f"error: {data.printable(str(error))}", file=sys.stderr, flush=True)
            turns = turns[:-1]
            continue
        answer = canvas.end(np.asarray(made.tokens)[0][made.written[0]])
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

    def __init__(self, model: hub.HubModel, codec: Tokenizer, ends: set[int], rule: Any):
        self._codec, self._ends, self._most = codec, ends, 0
        self._blocks = (rule.block_size or model.traits.block_size or 1) if rule.cached else 0
        self._left = rule.padding == "left"
        self._out: TextIO = sys.stdout
        self._rows, self._last, self._skip = 0, "", 0

    def begin(self, prompt: np.ndarray, most: int, multiple: int = 1) -> None:
        self._most = most
        self._rows, self._last, self._skip = 0, "", len(prompt)
        if self._left:
            unit = math.lcm(self._blocks or 1, multiple)
            self._skip = -(-len(prompt) // unit) * unit

    def show(self, tokens: np.ndarray) -> None:
        """Draw tokens [1, ...] so far, from the prompt on."""
        row, mask = tokens[0], self._codec.mask_id
        if self._blocks:  # what is before the prompt is masked
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


def _multiple(model: hub.HubModel, length: int) -> int:
    """What a row is padded to, unless that makes it longer than the model takes."""
    return _MULTIPLE if length + _MULTIPLE <= (model.traits.length or np.inf) else 1


def _longest(model: hub.HubModel, prompt: int) -> int:
    """Tokens of the longest answer: what the model's length leaves, at most 128."""
    left = (model.traits.length or np.inf) - prompt
    return int(min(_MOST, max(left // _STEP * _STEP, _STEP)))


def _rule(model: hub.HubModel) -> Any:
    """That of the family, unless it was trained in blocks that its own loop does not know."""
    rule = RULES.get(model.family.name, RULES["dllm"])
    in_blocks = model.traits.attention == "block"
    return RULES["dllm_blocks"] if in_blocks and not rule.cached else rule


def _end_of_turn(codec: Any) -> set[int]:
    """The token that ends what an assistant says, by the chat template."""
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    after = codec.encode(codec.render(said).text.rpartition(_PROBE)[2], special=True)
    return set(after[:1].tolist())


def _fitted(
    model: hub.HubModel, template: Any, turns: list[dict[str, str]], max_tokens: int | None
) -> tuple[np.ndarray, list[dict[str, str]]]:
    """The prompt of a conversation, whose oldest turns go where it is too long for the model."""
    length = model.traits.length or np.inf
    room = max_tokens or min(_MOST, length // 4)
    while True:
        prompt = template.prompt(turns)
        if len(turns) < 3 or len(prompt) + room <= length:
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
