"""Requests in text, answered once: encoded, grouped by length, journalled, resumed.

An answer is known by the SHA-256 of its request, the model's fingerprint and the settings; it is
appended to a JSON Lines file when its batch is done, and never asked for again.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.distributed import to_host
from mdm_jax.evaluation.model import EvaluatedModel, NotFinite, Scored, bucket
from mdm_jax.evaluation.settings import Settings
from mdm_jax.evaluation.windows import sliding_windows
from mdm_jax.progress import progress_bar
from mdm_jax.rng import content_words
from mdm_jax.samplers.filters import not_finite
from mdm_jax.types import PyTree

Answer = dict[str, Any]
"""JSON values. Likelihoods: ``log_likelihood``, its ``standard_error`` (Monte Carlo; 0 where exact,
None where unknown), ``estimates`` of the replicates, ``tokens``, ``passes``, ``greedy``;
generation: ``text``, ``tokens``, ``steps`` (forward passes for it); all: ``seconds``, the request's
share of its batch."""

_PREVIEW = 60


class Journal:
    """Answers by key in an append-only JSON Lines file; in memory alone without a path.

    A last line that a kill cut off is dropped, and ``torn`` names it. ValueError names a damaged
    line elsewhere.
    """

    def __init__(self, path: str | os.PathLike | None = None):
        self.path, self.answers, self.torn = path and pathlib.Path(path), {}, ""
        if self.path is None or not self.path.exists():
            return
        content = self.path.read_bytes()
        *lines, rest = content.split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                self.answers[record["key"]] = record["answer"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}:{number}: not an answered request: {line[:80]!r}; remove the "
                    "line, and that request is asked again"
                ) from error
        if rest:
            self.torn = (
                f"{self.path}:{len(lines) + 1}: a line cut off by a kill is dropped, and its "
                "request is asked again"
            )
            os.truncate(self.path, len(content) - len(rest))

    def add(self, answers: Iterable[tuple[str, Answer]]) -> None:
        """Keep answers, on disk when this returns."""
        answers = list(answers)
        self.answers.update(answers)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            for key, answer in answers:
                line = json.dumps({"key": key, "answer": answer}, ensure_ascii=False)
                file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


class Encoded(NamedTuple):
    """A request as tokens; ``content``: those that key its noise."""

    name: str
    prompt: np.ndarray
    answer: np.ndarray
    content: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Answerer:
    """Answers to requests in text by one model and settings; order of the results: the requests'.

    Attributes:
        batch: requests between two writes of the journal, at most; changes no figure.
        stops: strings that end an answer, besides those of its request.
        stream: where the decoding rule allows it, a generated row ends at its EOS and the next
            prompt takes its place, on one device (``hub.generate_stream``).
        progress: bars on standard error.

    ValueError for parameters that are not finite.
    """

    subject: EvaluatedModel
    settings: Settings = Settings()
    journal: Journal = dataclasses.field(default_factory=Journal)
    batch: int = 64
    stops: tuple[str, ...] = ()
    stream: bool = False
    progress: bool = False

    def __post_init__(self):
        _check_finite(self.subject.model.params)

    def likelihoods(
        self,
        pairs: Sequence[tuple[str, str]],
        names: Sequence[str] = (),
        questions: Sequence[Any] | None = None,
    ) -> list[Answer]:
        """Answers for (context, continuation) pairs; those with one context have common noise.

        ``questions``: what each pair is a choice of, None: of none. Under the setting ``certain``
        choices of one question are drawn until the best is certain, by nats and by nats per
        character. Its answers are known by all its choices.

        Spaces at the end of a context belong to the continuation, as in lm-eval. ValueError, before
        anything is run, names a request with an empty continuation, or one that does not fit.
        """
        names = names or _names([context for context, _ in pairs])
        encoded = [self._encoded_pair(name, *pair) for name, pair in zip(names, pairs)]
        keys = [self.key("loglikelihood", pair) for pair in pairs]
        groups = collections.defaultdict(list)
        if self.settings.certain and self.subject.kind != "autoregressive":
            for i, question in enumerate(questions or [None] * len(pairs)):
                groups[question].append(i)
            groups.pop(None, None)
        groups = {q: members for q, members in groups.items() if len(members) > 1}
        for members in groups.values():
            whole = [pairs[i] for i in members]
            for place, i in enumerate(members):
                keys[i] = self.key("choice", [whole, place])
        self._choose(encoded, keys, [len(text.lstrip()) for _, text in pairs], [*groups.values()])
        return self._scored(encoded, keys, "likelihoods")

    def rolling(self, texts: Sequence[str], names: Sequence[str] = ()) -> list[Answer]:
        """Answers for whole texts, cut into windows of the model's length without overlap.

        The last window ends where its text ends. Windows of models with shifted logits begin with
        the last token of the one before, which predicts. ValueError for an empty text.
        """
        subject, settings, encoded, keys = self.subject, self.settings, [], []
        for number, (name, text) in enumerate(zip(names or _names(texts), texts)):
            ids = self._encode(text)
            if not len(ids):
                raise ValueError(f"{name} has no text to score")
            own = min(subject.length(settings), bucket(len(ids), 2**30, subject.multiple))
            eligible = np.ones(len(ids), bool)
            if subject.model.traits.shift:  # the first token is predicted from the one before
                ids = np.insert(ids, 0, subject.start_id)
                eligible = np.insert(eligible, 0, False)
                own = min(subject.length(settings), own + 1)
            pad = subject.tokenizer.pad_id
            stride = own - subject.model.traits.shift
            windows = sliding_windows([ids], own, stride, pad_id=pad, eligible=[eligible])
            for index, row in enumerate(zip(*windows.rows[:3])):
                tokens, eligible, documents = (np.asarray(part)[row[2] > 0] for part in row)
                first = int(np.argmax(eligible))
                encoded.append(Encoded(name, tokens[:first], tokens[first:], tokens))
                keys.append((self.key("rolling", [text, index]), number))
        answers = self._scored(encoded, [key for key, _ in keys], "texts")
        parts = collections.defaultdict(list)
        for (_, number), answer in zip(keys, answers):
            parts[number].append(answer)
        return [_sum(parts[number]) for number in range(len(texts))]

    def continuations(
        self, requests: Sequence[tuple[str, dict[str, Any]]], names: Sequence[str] = ()
    ) -> list[Answer]:
        """Answers for (context, generation arguments of lm-eval).

        Read are ``until``, ``max_gen_toks``, ``temperature``, ``top_p`` and ``do_sample`` (without
        it: the likeliest tokens); the settings' own come first. The same request again is another
        draw. ValueError names an argument of the wrong kind, or a request that does not fit.
        """
        seen: collections.Counter[str] = collections.Counter()
        groups, keys = collections.defaultdict(list), []
        names = names or _names([context for context, _ in requests])
        for name, (context, arguments) in zip(names, requests):
            request = _Generation.read(arguments, self, name)
            prompt = self._fit(name, self._encode(context), request.tokens)
            content = self.key("generate", [context, dataclasses.astuple(request)])
            key = self.key("generate", [content, seen[content]])
            seen[content] += 1
            keys.append(key)
            if key not in self.journal.answers:
                words = content_words(self.settings.seed, seen[content], prompt)
                room = self.subject.room(len(prompt), request.tokens, self.settings)
                groups[room, request].append(_Prompt(key, name, prompt, words[0] >> 1))
        with self._bar(sum(map(len, groups.values())), "generation") as bar:
            for (_, request), members in sorted(groups.items(), key=lambda item: item[0][0]):
                self._generate(members, request, bar)
        return [self.journal.answers[key] for key in keys]

    def key(self, kind: str, content: Any) -> str:
        """What an answer is known by."""
        settings = dataclasses.asdict(self.settings)
        whole = [kind, content, self.subject.fingerprint, settings]
        return hashlib.sha256(json.dumps(whole, default=str).encode()).hexdigest()

    # --- pieces ----------------------------------------------------------------------------------

    def _encode(self, text: str) -> np.ndarray:
        """Token ids; of other models' tokenizers special tokens are read, as by transformers."""
        codec = self.subject.tokenizer
        ids = codec.encode(text, special=True) if hasattr(codec, "render") else codec.encode(text)
        if np.any(ids == self.subject.mask_id):
            raise ValueError(f"a request holds the mask token: {text[:_PREVIEW]!r}; remove it")
        if np.any(ids >= self.subject.model.traits.vocab_size):
            raise ValueError(
                f"the tokenizer knows {codec.vocab_size} tokens, the model "
                f"{self.subject.model.traits.vocab_size}: it is another model's"
            )
        return ids

    def _encoded_pair(self, name: str, context: str, continuation: str) -> Encoded:
        if not continuation:
            raise ValueError(f"{name} has an empty continuation, of log-likelihood 0 in any model")
        kept = context.rstrip() if context.strip() else ""
        whole, prompt = self._encode(context + continuation), self._encode(kept)
        answer = whole[len(prompt) :]
        if not len(answer) or not np.array_equal(whole[: len(prompt)], prompt):
            # A token crosses the bound: piece by piece, as when the answer is generated.
            answer = self._encode(context[len(kept) :] + continuation)
        prompt = self._fit(name, prompt, len(answer))
        if self.subject.model.traits.shift and not len(prompt):
            prompt = np.array([self.subject.start_id], np.int32)
        return Encoded(name, prompt, answer, prompt if len(prompt) else answer)

    def _fit(self, name: str, prompt: np.ndarray, new_tokens: int) -> np.ndarray:
        longest = self.subject.length(self.settings)
        if len(prompt) + new_tokens <= longest:
            return prompt
        if self.settings.truncate and new_tokens < longest:
            return prompt[len(prompt) + new_tokens - longest :]
        raise ValueError(
            f"{name} has {len(prompt)} tokens and {new_tokens} to score or generate, more than the "
            f"{longest} of the model; --settings=truncate=True cuts prompts on the left, fewer "
            "--max_tokens leave more room, and max_length=N is for models that take longer rows"
        )

    def _scored(self, encoded: Sequence[Encoded], keys: Sequence[str], what: str) -> list[Answer]:
        groups = collections.defaultdict(dict)
        longest, multiple = self.subject.length(self.settings), self.subject.multiple
        for one, key in zip(encoded, keys):
            if key not in self.journal.answers:
                size = bucket(len(one.prompt) + len(one.answer), longest, multiple)
                groups[size][key] = one
        with self._bar(sum(map(len, groups.values())), what) as bar:
            for size, members in sorted(groups.items()):
                for part in _parts([*members.items()], self.batch):
                    self._score(part, self.subject.score, (size, self.settings))
                    bar.update(len(part))
        return [self.journal.answers[key] for key in keys]

    def _choose(
        self,
        encoded: Sequence[Encoded],
        keys: Sequence[str],
        characters: Sequence[int],
        questions: Sequence[Sequence[int]],
    ) -> None:
        """Answer the ``questions``, numbers of their choices, together where equally many."""
        longest, multiple = self.subject.length(self.settings), self.subject.multiple
        sizes = collections.defaultdict(dict)
        for members in questions:
            if any(keys[i] not in self.journal.answers for i in members):
                sizes[len(members)][keys[members[0]]] = members  # the same again is one
        with self._bar(sum(n * len(own) for n, own in sizes.items()), "choices") as bar:
            for count, own in sorted(sizes.items()):
                for part in _parts([*own.values()], max(self.batch // count, 1)):
                    flat = [i for members in part for i in members]
                    number = np.arange(len(flat)).reshape(-1, count)
                    per = np.maximum(np.array([characters[i] for i in flat]), 1).reshape(-1, count)
                    lengths = [len(encoded[i].prompt) + len(encoded[i].answer) for i in flat]
                    lengths = sorted({bucket(n, longest, multiple) for n in lengths})
                    asked = [(keys[i], encoded[i]) for i in flat]
                    options = (lengths, number, [np.ones_like(per), per], self.settings)
                    self._score(asked, self.subject.choose, options)
                    bar.update(len(flat))

    def _score(
        self,
        part: Sequence[tuple[str, Encoded]],
        score: Callable[..., list[Scored]],
        options: Sequence[Any],
    ) -> None:
        """Answer requests by ``score(rows, contents, *options)``, and keep the answers."""
        started, rows = time.monotonic(), []
        for _, one in part:
            eligible = np.arange(len(one.prompt) + len(one.answer)) >= len(one.prompt)
            rows.append((np.concatenate([one.prompt, one.answer]), eligible))
        with _named([one.name for _, one in part]):
            scored = score(rows, [one.content for _, one in part], *options)
        greedy = [each.greedy for each in scored]
        greedy = self._greedy(part) if self.settings.check_greedy else greedy
        seconds = (time.monotonic() - started) / len(part)
        self.journal.add(
            (
                key,
                {
                    "log_likelihood": -each.value,
                    "standard_error": _number(each.standard_error),
                    "estimates": (-each.nats).tolist(),
                    "tokens": len(one.answer),
                    "passes": each.passes,
                    "greedy": bool(same),
                    "seconds": round(seconds, 4),
                },
            )
            for (key, one), each, same in zip(part, scored, greedy)
        )

    def _greedy(self, part: Sequence[tuple[str, Encoded]]) -> np.ndarray:
        """Whether decoding with temperature 0 and the answer's length gives each answer."""
        settings = dataclasses.replace(self.settings, temperature=0.0, top_p=1.0)
        same, groups = np.zeros(len(part), bool), collections.defaultdict(list)
        for i, (_, one) in enumerate(part):
            room = self.subject.room(len(one.prompt), len(one.answer), settings)
            groups[room, len(one.answer)].append(i)
        for (_, count), members in groups.items():
            prompts = [part[i][1].prompt for i in members]
            with _named([part[i][1].name for i in members]):
                made = self.subject.write(prompts, count, np.zeros(len(members)), settings)
            for i, written in zip(members, made):
                same[i] = np.array_equal(written.tokens, part[i][1].answer)
        return same

    def _generate(self, members: Sequence["_Prompt"], request: "_Generation", bar: Any):
        settings, started = request.of(self.settings), time.monotonic()
        streams = self.stream and self.subject.streams(settings)
        for part in [members] if streams else _parts(members, self.batch):
            write = self.subject.stream if streams else self.subject.write
            prompts, numbers = [one.prompt for one in part], [one.number for one in part]
            with _named([one.name for one in part]):
                rows = write(prompts, request.tokens, np.array(numbers, np.int32), settings)
                for group in ([row] for row in rows) if streams else [[*enumerate(rows)]]:
                    seconds = (time.monotonic() - started) / len(group)
                    answers = []
                    for i, written in group:
                        text, count = self._text(written.tokens, request.until)
                        about = {"tokens": count, "steps": int(written.passes)}
                        about["seconds"] = round(seconds, 4)
                        answers.append((part[i].key, {"text": text, **about}))
                    self.journal.add(answers)
                    bar.update(len(group))
                    started = time.monotonic()

    def _text(self, ids: np.ndarray, until: Sequence[str]) -> tuple[str, int]:
        """Text before the first EOS and the first of the strings; tokens before the EOS."""
        codec = self.subject.tokenizer
        ids = codec.truncate_at_eos(ids)
        literal = hasattr(codec, "decode_literally")
        text = codec.decode_literally(ids) if literal else codec.decode(ids)
        ends = [text.index(stop) for stop in until if stop in text]
        text = text[: min(ends)] if ends else text
        if literal:  # what is left of special tokens goes, as in LLaDA's evaluation
            text = codec.decode_literally(codec.encode(text, special=True), skip_special=True)
        return text, len(ids)

    def _bar(self, total: int, what: str) -> Any:
        return progress_bar(total, what, "requests", silent=not self.progress)


class _Prompt(NamedTuple):
    """A prompt to continue, and the number that keys its noise."""

    key: str
    name: str
    prompt: np.ndarray
    number: int


@dataclasses.dataclass(frozen=True)
class _Generation:
    """What is read of lm-eval's generation arguments."""

    until: tuple[str, ...]
    tokens: int
    temperature: float
    top_p: float

    @classmethod
    def read(cls, arguments: dict[str, Any], answerer: Answerer, name: str) -> "_Generation":
        settings, until = answerer.settings, arguments.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        until += answerer.stops
        tokens = settings.max_tokens or arguments.get("max_gen_toks")
        tokens = tokens or arguments.get("max_new_tokens") or answerer.subject.answer_length or 256
        sampled = arguments.get("do_sample", arguments.get("temperature", 0) > 0)
        temperature = settings.temperature or (sampled and arguments.get("temperature", 1.0))
        top_p = settings.top_p if settings.top_p < 1 else arguments.get("top_p", 1.0)
        if not all(isinstance(stop, str) and stop for stop in until) or not (
            isinstance(tokens, int) and tokens >= 1
        ):
            raise ValueError(
                f"{name}: until must be strings and max_gen_toks at least 1, got {arguments}"
            )
        return cls(until, tokens, float(temperature), float(top_p))

    def of(self, settings: Settings) -> Settings:
        return dataclasses.replace(settings, temperature=self.temperature, top_p=self.top_p)


@contextlib.contextmanager
def _named(names: Sequence[str]) -> Iterator[None]:
    """NotFinite as ValueError with the name of the request."""
    try:
        yield
    except NotFinite as error:
        raise not_finite(names[error.args[0]]) from error


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _names(contexts: Sequence[str]) -> list[str]:
    return [f"request {number} ({text[-_PREVIEW:]!r})" for number, text in enumerate(contexts)]


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _sum(parts: Sequence[Answer]) -> Answer:
    """The answer for a text from those of its windows."""
    errors = [part["standard_error"] for part in parts]
    return {
        "log_likelihood": math.fsum(part["log_likelihood"] for part in parts),
        "standard_error": None if None in errors else math.hypot(*errors),
        "tokens": sum(part["tokens"] for part in parts),
        "passes": sum(part["passes"] for part in parts),
        "greedy": all(part["greedy"] for part in parts),
        "seconds": sum(part["seconds"] for part in parts),
    }


def _check_finite(params: PyTree) -> None:
    """Raise ValueError, naming the array, if a parameter is not finite."""
    flags = jax.jit(lambda tree: jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), tree))(
        params
    )
    for path, fine in jax.tree_util.tree_leaves_with_path(to_host(flags)):
        if not fine:
            raise ValueError(
                f"the parameters {jax.tree_util.keystr(path)} hold numbers that are not finite: "
                "the model has diverged or was damaged; evaluate an earlier checkpoint"
            )
