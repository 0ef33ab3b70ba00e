"""A model as evaluation reads it: nats of answers and continuations of prompts, in few shapes.

A pass runs ``rows`` rows on each device, filled up with copies, of a length from :func:`bucket`,
and a row's noise is keyed by what it says: figures depend to the bit neither on the order and
grouping of requests, nor on the number of devices, nor on an interruption. (Products of another
number of rows may be summed up in another order.)
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from mdm_jax import likelihood, models, samplers
from mdm_jax.data.tokenizers import Tokenizer
from mdm_jax.distributed import ROW_AXES, spread_rows, to_host
from mdm_jax.estimates import standard_error_of_mean
from mdm_jax.evaluation.choices import beside_leader, choose_until
from mdm_jax.evaluation.settings import FAST, FIRST, Settings
from mdm_jax.hub import HubModel
from mdm_jax.hub.decoding import generate, generate_stream
from mdm_jax.hub.rules import Rule, as_trained, find_rule
from mdm_jax.likelihood.estimators import Estimator
from mdm_jax.likelihood.rows import Row
from mdm_jax.likelihood.stopping import Stop, each_row, narrow, replicate_until
from mdm_jax.likelihood.subsets import exact_when_short
from mdm_jax.models.cross_entropy import exclude_token
from mdm_jax.pytrees import checksum
from mdm_jax.rng import content_words
from mdm_jax.samplers.filters import NOT_FINITE
from mdm_jax.schedules import grids
from mdm_jax.types import Array

Process = Literal["masked", "block", "uniform", "autoregressive"]


class Scored(NamedTuple):
    """Nats of a row: its estimates [R], one where ``exact``, and what is made of them.

    Attributes:
        greedy: whether all its tokens are the likeliest; known of autoregressive models alone.
        value: the mean; of choices that stopped at different times, the leader's mean and the mean
            difference from it, on common noise.
        standard_error: Monte Carlo standard error of ``value``; NaN for one replicate.
    """

    nats: np.ndarray
    exact: bool
    passes: int
    greedy: bool
    value: float
    standard_error: float


class Written(NamedTuple):
    """Tokens [new_tokens] of a continuation, and forward passes of the network for it."""

    tokens: np.ndarray
    passes: int


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluatedModel:
    """A model to evaluate.

    Attributes:
        process: what it was trained as; None: what its family says.
        trained_here: by an objective that never lets the mask token be predicted.
        parameters: which they are, for the audit line.
        answer_length: tokens of an answer in training, if fixed.
        window: blocks that a block attends to, itself included; None: all.
    """

    model: HubModel
    tokenizer: Tokenizer
    process: Process | None = None
    trained_here: bool = False
    parameters: str = "as stored"
    answer_length: int | None = None
    window: int | None = None

    @property
    def kind(self) -> Process:
        if self.process is not None:
            return self.process
        if self.model.family.name in ("duo", "udlm"):
            return "uniform"
        return {"causal": "autoregressive", "block": "block"}.get(
            self.model.traits.attention, "masked"
        )

    @property
    def mask_id(self) -> int:
        """Marks what is to be generated; of uniform models an id beyond their tokens."""
        if self.kind == "uniform":
            return self.num_tokens
        known = self.model.traits.mask_id
        return self.tokenizer.mask_id if known is None else known

    @property
    def num_tokens(self) -> int:
        """Ids of uniform noise."""
        return self.model.traits.vocab_size - self.trained_here

    @property
    def excluded_id(self) -> int | None:
        """The mask token where it has no probability, as for the original's own evaluation."""
        rule = find_rule(self.model.family.name, self.model.traits)
        causal = self.kind == "autoregressive"
        return self.mask_id if self.trained_here or (rule.excludes_mask and not causal) else None

    @property
    def hidden(self) -> tuple[int, ...]:
        """Ids that are never written: padding of runs of ours, which no row of theirs holds."""
        pad, eos = self.tokenizer.pad_id, self.tokenizer.eos_id
        return (pad,) if self.trained_here and pad != eos else ()

    @property
    def start_id(self) -> int:
        """What a causal model reads before the first token."""
        traits = self.model.traits
        known = (traits.bos_id, getattr(self.tokenizer, "bos_id", None), traits.eos_id)
        return next((i for i in known if i is not None), self.tokenizer.eos_id)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of integer sums over the parameters' bits, config and process; of any mesh."""
        found = [f"{self.kind} {self.trained_here} {self.model.config!r} {self.model.traits!r}"]
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.model.params):
            sums = [int(part) for part in jax.device_get(checksum(leaf))]
            found.append(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} {sums}")
        return hashlib.sha256("\n".join([*found, self.tokenizer.fingerprint]).encode()).hexdigest()

    @functools.cached_property
    def apply_fn(self) -> Callable[..., Any]:
        """As objectives call it."""
        module, traits = self.model.model, self.model.traits
        chunking = models.Chunking(self.devices)
        if self.kind == "block":
            return models.block_apply(module, traits.block_size, self.window, chunking)
        if self.kind == "autoregressive":
            return models.causal_apply(module, self.start_id, chunking=chunking)
        apply_fn = models.readout_apply(module, chunking)
        return models.shifted_apply(apply_fn) if traits.shift else apply_fn

    @functools.cached_property
    def devices(self) -> int:
        """Over which rows are spread."""
        sharding = jax.tree.leaves(self.model.params)[0].sharding
        shape = getattr(getattr(sharding, "mesh", None), "shape", {})
        return math.prod(shape.get(axis, 1) for axis in ROW_AXES)

    def length(self, settings: Settings) -> int:
        """Tokens of the longest row."""
        known = settings.max_length or self.model.traits.length or 2**20
        return known // self.multiple * self.multiple

    @property
    def multiple(self) -> int:
        """What rows are a multiple of."""
        return self.model.traits.block_size or 1 if self.kind == "block" else 1

    # --- likelihood ------------------------------------------------------------------------------

    def estimator(self, settings: Settings) -> Estimator:
        """That of the bound, or of the likelihood; ValueError for a design that it cannot have."""
        coupling = {"levels": settings.levels, "masks": settings.masks}
        coupling = {name: value for name, value in coupling.items() if value}
        wanted = (settings.passes, settings.exact_up_to, settings.replicates, *coupling.items())
        cache = self.__dict__.setdefault("_estimators", {})
        if wanted not in cache:
            cache[wanted] = self._estimator(settings, coupling)
        return cache[wanted]

    def _estimator(self, settings: Settings, coupling: dict[str, str]) -> Estimator:
        excludes = self.excluded_id is not None
        if self.kind == "autoregressive":
            return likelihood.next_token_estimator(self.apply_fn, self.excluded_id)
        if self.kind == "uniform":
            options = (self.num_tokens, settings.passes)
            return likelihood.uniform_estimator(self.apply_fn, *options, **coupling)
        design, size = likelihood.counts(settings.passes, **coupling), None
        if self.kind == "block":
            size = self.multiple
            design = likelihood.block_design(design, size, settings.replicates)
        elif settings.exact_up_to:
            design = exact_when_short(design, settings.exact_up_to)
        options = {"block_size": size, "excludes_mask": excludes}
        return likelihood.masked_estimator(self.apply_fn, self.mask_id, design, **options)

    def score(
        self, rows: Sequence[Row], contents: Sequence[np.ndarray], length: int, settings: Settings
    ) -> list[Scored]:
        """Nats of the eligible tokens of rows (``likelihood.rows.Row``), given the others.

        Rows are filled up to ``length``. Their noise is keyed by the seed and ``contents``, token
        ids; rows with the same have common noise. :class:`NotFinite` with the number of a row.
        """
        draws, number = _Draws(self, rows, contents, [length], settings), len(rows)
        if settings.width:
            stop = narrow(settings.replicates, settings.width)
            values = replicate_until(draws, number, each_row(number), stop).row_values
        else:
            values = draws(np.arange(number), 0, settings.replicates)
        return [draws.scored(i, values[~np.isnan(values[:, i]), i]) for i in range(number)]

    def choose(
        self,
        rows: Sequence[Row],
        contents: Sequence[np.ndarray],
        lengths: Sequence[int],
        number: np.ndarray,
        divisors: Sequence[np.ndarray],
        settings: Settings,
    ) -> list[Scored]:
        """As :meth:`score`, of candidates, until the best of each question is certain.

        ``number`` [Q, C]: rows of each question's candidates. It is certain by nats over each of
        the ``divisors`` [Q, C] (``evaluation.choose_until``). Rows are filled up to the smallest of
        ``lengths``, ascending, that fits.
        """
        draws = _Draws(self, rows, contents, lengths, settings)
        values = np.full((settings.replicates, len(rows)), np.nan)

        def draw(own: np.ndarray, first: int, count: int) -> np.ndarray:
            """Drawn once, whatever is looked at."""
            part = slice(first, first + count)
            new = own[np.isnan(values[part][:, own]).any(axis=0)]
            values[part, new] = draws(new, first, count)
            return values[part][:, own]

        first = np.zeros(len(number), int)  # which one is correct, is not asked here
        round_ = max(4, -(-settings.replicates // 32))
        stop = Stop(settings.replicates, FIRST, round_, coverage=settings.certain)
        chosen = [choose_until(draw, number, first, stop, each) for each in divisors][0].chosen
        found: list[Scored | None] = [None] * len(rows)
        drawn = np.sum(~np.isnan(values), axis=0)
        for question, best in zip(number, chosen):
            # The one drawn longest, which is the best unless another divisor kept others open.
            longest = max(question, key=lambda row: (drawn[row], row == question[best]))
            for row in question:
                own = draws.scored(row, values[: drawn[row], row])
                if not own.exact:
                    value, error = beside_leader(own.nats, values[: drawn[longest], longest])
                    own = own._replace(value=value, standard_error=error)
                found[row] = own
        return found

    # --- generation ------------------------------------------------------------------------------

    def write(
        self,
        prompts: Sequence[np.ndarray],
        new_tokens: int,
        numbers: np.ndarray,
        settings: Settings,
    ) -> list[Written]:
        """Continuations of prompts of one bucket (:meth:`room`).

        ``numbers`` [N] key the rows' noise. ValueError as ``hub.generate``; :class:`NotFinite` with
        the number of a row.
        """
        size, parts = settings.rows * self.devices, []
        for start in range(0, len(prompts), size):
            own = [*prompts[start : start + size]]
            rows = own + [own[-1]] * (size - len(own))
            keys = _filled(np.asarray(numbers[start : start + size], np.int32), size)
            tokens, passes = self._write(rows, new_tokens, keys, settings)
            parts += [Written(*row) for row in zip(tokens, passes)][: len(own)]
        for i, row in enumerate(parts):
            if np.any(row.tokens == NOT_FINITE):
                raise NotFinite(i)
        return parts

    def streams(self, settings: Settings) -> bool:
        """Whether rows can come and go (:meth:`stream`)."""
        if self.kind not in ("masked", "block") or self.devices > 1:
            return False
        rule = self._rule(settings)
        return not rule.cached and rule.schedule != "ancestral"

    def stream(
        self,
        prompts: Sequence[np.ndarray],
        new_tokens: int,
        numbers: np.ndarray,
        settings: Settings,
    ) -> Iterator[tuple[int, Written]]:
        """As :meth:`write`, each as soon as it is finished, with its place among the prompts.

        A row ends at its EOS, and the next prompt takes its place.
        """
        length, _ = self.room(max(map(len, prompts)), new_tokens, settings)
        options = {"rule": self._rule(settings), "pad_multiple": length} | self._ids
        options |= {"key": jax.random.key(settings.seed), "key_numbers": numbers}
        rows = generate_stream(self.model, prompts, new_tokens, batch_size=settings.rows, **options)
        for row in rows:
            if np.any(row.tokens == NOT_FINITE):
                raise NotFinite(row.number)
            yield row.number, Written(row.tokens, row.steps)

    @property
    def _ids(self) -> dict[str, int]:
        codec = self.tokenizer
        return {"mask_id": self.mask_id, "eos_id": codec.eos_id, "pad_id": codec.pad_id}

    def room(self, prompt: int, new_tokens: int, settings: Settings) -> tuple[int, int]:
        """(positions, blocks of the prompt) by which prompts are grouped: one program for each.

        Positions of the whole row, or of its prompt where rows are filled up on the left.
        """
        longest, size = self.length(settings), self.multiple
        if self.kind in ("masked", "block"):
            rule = self._rule(settings)
            if rule.padding == "left":
                return bucket(prompt, longest - new_tokens, size), 0
            if rule.cached:
                return bucket(prompt + new_tokens, longest, size), prompt // size
        return bucket(prompt + new_tokens, longest, size), 0

    def _write(self, prompts, new_tokens, numbers, settings) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [N, new_tokens] and passes [N]."""
        length, _ = self.room(max(map(len, prompts)), new_tokens, settings)
        key, codec = jax.random.key(settings.seed), self.tokenizer
        if self.kind in ("masked", "block"):
            options = {"key": key, "row_offset": numbers, "stop": False, "pad_multiple": length}
            options["rule"] = self._rule(settings)
            made = generate(self.model, prompts, new_tokens, **options, **self._ids)
            tokens, passes = to_host((made.tokens, made.passes))
            rows = [own[free][:new_tokens] for own, free in zip(tokens, made.written)]
            return np.stack(rows), passes
        causal = self.kind == "autoregressive"
        canvas = np.full((len(prompts), length), codec.pad_id, np.int32)
        documents = np.zeros_like(canvas)
        first = length - new_tokens
        for i, prompt in enumerate(prompts):
            start = first - len(prompt) if causal else 0
            canvas[i, start : start + len(prompt)] = prompt
            canvas[i, start + len(prompt) : start + len(prompt) + new_tokens] = self.mask_id
            documents[i, start : start + len(prompt) + new_tokens] = 1
        free = canvas == self.mask_id
        canvas, documents = spread_rows((canvas, documents), self.model.params)
        program = self._generator(causal, first, new_tokens, settings)
        tokens = to_host(program(self.model.params, key, canvas, documents, numbers))
        passes = new_tokens + bool(first) if causal else settings.steps or new_tokens
        return tokens[free].reshape(len(prompts), new_tokens), np.full(len(prompts), passes)

    def _rule(self, settings: Settings) -> Rule:
        """The decoding rule: by name, or the one that suits the model; ValueError for no name."""
        traits = self.model.traits
        given = as_trained(traits, self.trained_here, self.hidden, self.window or 0)
        given |= {"temperature": settings.temperature, "guidance": settings.guidance}
        given |= {"steps": settings.steps} if settings.steps else {}
        given |= {"block_size": settings.block_size} if settings.block_size else {}
        given |= {"top_p": settings.top_p} if settings.top_p < 1 else {}
        fast = {name: getattr(settings, name) for name in FAST}
        given |= {name: value for name, value in fast.items() if value}
        rule = find_rule(self.model.family.name, traits, settings.rule or None)
        return dataclasses.replace(rule, **given)

    def _generator(self, causal, prefix, new_tokens, settings) -> Callable[..., Array]:
        wanted = (causal, prefix, new_tokens, settings)
        if wanted not in (cache := self.__dict__.setdefault("_generators", {})):
            chosen = [samplers.temperature(settings.temperature)]
            chosen += [samplers.top_p(settings.top_p)] if settings.top_p < 1 else []
            keep = samplers.compose(lambda logits: exclude_token(logits, *self.hidden), *chosen)
            module = self.model.model
            if causal:
                decoder = models.cached_causal_decoder(module, self.start_id)
                options = {"mask_id": self.mask_id, "token_filter": keep, "prefix": prefix}
                cache[wanted] = samplers.make_next_token_generator(decoder, **options)
            else:
                sampler = samplers.uniform_ancestral(self.num_tokens, keep)
                levels = grids.uniform_masking_rate(settings.steps or new_tokens)
                made = samplers.make_generator(module.apply, sampler, levels, mask_id=self.mask_id)
                cache[wanted] = made
        return cache[wanted]

    # --- words about it --------------------------------------------------------------------------

    def audit(self, settings: Settings) -> dict[str, Any]:
        """What the figures are figures of."""
        drawn = self.kind != "autoregressive"
        asked = {
            "width": settings.width,
            "choices": settings.certain and f"until {settings.certain:.0%} certain",
            "cache": settings.approximation and f"approximate, {settings.approximation}",
        }
        return {
            "process": self.kind,
            "family": self.model.family.name,
            "parameters": self.parameters,
            "dtype": np.dtype(self.model.config.dtype).name,
            "scored": "tokens of the continuation, given the context and their number; BOS, EOS "
            "and padding are not scored, padding is hidden",
            "mask_token": "no probability" if self.excluded_id is not None else "in the softmax",
            "design": self.estimator(settings).design,
            "passes": settings.passes if drawn else 1,
            "replicates": settings.replicates if drawn else 1,
            **{name: value for name, value in asked.items() if value},
            "greedy": "checked" if not drawn or settings.check_greedy else "not checked",
            "seed": settings.seed,
        }


class _Draws:
    """Replicates of the rows of a subject, checked (``likelihood.RowDraws``)."""

    def __init__(
        self,
        subject: EvaluatedModel,
        rows: Sequence[Row],
        contents: Sequence[np.ndarray],
        lengths: Sequence[int],
        settings: Settings,
    ):
        words = np.stack([content_words(settings.seed, 0, content) for content in contents])
        causal = subject.kind == "autoregressive"
        self._misses = np.full(len(rows), -1)
        self.draws = likelihood.RowDraws(
            subject.estimator(settings),
            subject.model.params,
            rows,
            jax.random.wrap_key_data(words, impl="threefry2x32"),
            batch_size=settings.rows * subject.devices,
            pad_id=subject.tokenizer.pad_id,
            lengths=lengths,
            keep=self._keep if causal else None,
        )

    def _keep(self, rows: np.ndarray, _nats: np.ndarray, misses: np.ndarray) -> None:
        self._misses[rows] = misses

    def __call__(self, rows: np.ndarray, first: int, count: int) -> np.ndarray:
        values = self.draws(rows, first, count)
        wrong = ~np.isfinite(values).all(axis=0)
        if wrong.any():
            raise NotFinite(int(rows[wrong][0]))
        return values

    def scored(self, row: int, nats: np.ndarray) -> Scored:
        estimator, eligible = self.draws.estimator, self.draws.rows[row][1]
        length = self.draws.length[row]
        padded = np.pad(eligible, (0, length - len(eligible)))[None]
        exact = bool(estimator.fixed(padded)[0])
        nats = nats[:1] if exact else nats
        passes = len(nats) * int(estimator.views(padded)[0])
        error = 0.0 if exact else standard_error_of_mean(nats)
        return Scored(nats, exact, passes, self._misses[row] == 0, float(nats.mean()), error)


class NotFinite(ValueError):
    """Nats, or logits, of row ``args[0]`` are not finite."""


def bucket(length: int, longest: int, multiple: int = 1) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that holds a row, a multiple, at most longest."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    size = -(-size // multiple) * multiple
    return max(min(size, longest), -(-length // multiple) * multiple)


def _filled(values: np.ndarray, size: int) -> np.ndarray:
    """The first axis filled up with copies of the last entry."""
    return np.concatenate([values, np.repeat(values[-1:], size - len(values), axis=0)])
