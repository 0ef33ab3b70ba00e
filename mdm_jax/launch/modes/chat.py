"""The mode ``chat``: a conversation in the terminal that shows the canvas being unmasked."""

import contextlib
import math
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from mdm_jax import data, files, hub
from mdm_jax.data.tokenizers import Tokenizer, load_tokenizer
from mdm_jax.hub.decoding import generate
from mdm_jax.hub.rules import as_trained, find_rule
from mdm_jax.launch.modes.sample import MASK_TEXT
from mdm_jax.launch.sampling.screen import Screen
from mdm_jax.samplers.filters import NOT_FINITE, check_finite

_PROBE = "mdm"
_MULTIPLE = 32  # tokens, that rows are padded to: prompts of most lengths share a program
_MOST, _STEP = 128, 16  # tokens of an answer, unless the model's length leaves fewer, in such steps


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
    rule, codec_ends = find_rule(model.family.name, model.traits), {codec.eos_id}
    hidden = () if codec.pad_id == codec.eos_id else (codec.pad_id,)
    changes = as_trained(model.traits, trained_here, hidden, window)
    changes |= {"steps": steps, "temperature": temperature}
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
            longest = max_tokens or longest_answer(model, len(prompt))
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
            check_finite(np.asarray(made.tokens), f"line {number + 1}")
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
    """The answer in the making on standard output."""

    def __init__(self, model: hub.HubModel, codec: Tokenizer, ends: set[int], rule: Any):
        self._codec, self._ends, self._most, self._skip = codec, ends, 0, 0
        blocks = (rule.block_size or model.traits.block_size or 1) if rule.cached else 1
        self._unit = blocks if rule.padding == "left" else 0
        self._screen = Screen(sys.stdout)

    def begin(self, prompt: np.ndarray, most: int, multiple: int = 1) -> None:
        self._most, self._skip = most, len(prompt)
        if self._unit:
            unit = math.lcm(self._unit, multiple)
            self._skip = -(-len(prompt) // unit) * unit

    def show(self, tokens: np.ndarray) -> None:
        """Draw tokens [1, L] so far, from the prompt on."""
        self._screen.draw(self._text(tokens[0, self._skip :][: self._most]))

    def end(self, tokens: np.ndarray) -> str:
        """Draw the whole answer, which is returned as the model wrote it."""
        self._screen.end(self._text(tokens))
        return self._codec.decode(self._cut(tokens), mask_text="")

    def _cut(self, tokens: np.ndarray) -> np.ndarray:
        ends = np.flatnonzero(np.isin(tokens, list(self._ends)))
        return tokens[: ends[0]] if len(ends) else tokens

    def _text(self, tokens: np.ndarray) -> str:
        """Without power over the terminal."""
        tokens = np.where(tokens == NOT_FINITE, self._codec.mask_id, tokens)  # said in the end
        text = self._codec.decode(self._cut(tokens), mask_text=MASK_TEXT)
        return data.printable(text).expandtabs()


def _multiple(model: hub.HubModel, length: int) -> int:
    """What a row is padded to, unless that makes it longer than the model takes."""
    return _MULTIPLE if length + _MULTIPLE <= (model.traits.length or np.inf) else 1


def longest_answer(model: hub.HubModel, prompt: int) -> int:
    """Tokens of the longest answer: what the model's length leaves, at most 128."""
    left = (model.traits.length or np.inf) - prompt
    return int(min(_MOST, max(left // _STEP * _STEP, _STEP)))


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
