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
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax import likelihood, models, samplers
from mdm_jax.checks import Name, Plain, Real, Whole, checked
from mdm_jax.data.tokenizers import Tokenizer
from mdm_jax.distributed import ROW_AXES, spread_rows, to_host
from mdm_jax.estimates import standard_error_of_mean
from mdm_jax.hub import HubModel
from mdm_jax.hub.decoding import generate
from mdm_jax.hub.rules import Rule, as_trained, find_rule
from mdm_jax.likelihood.estimators import Estimator
from mdm_jax.likelihood.rows import Row
from mdm_jax.likelihood.stopping import each_row, narrow, replicate_until
from mdm_jax.likelihood.subsets import LEVELS, MASKS, exact_when_short
from mdm_jax.models.cross_entropy import exclude_token, position_losses
from mdm_jax.schedules import grids
from mdm_jax.types import Array

Process = Literal["masked", "block", "uniform", "autoregressive"]


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How requests are answered; part of what an answer is known by."""

    levels: Annotated[str, Name(("", *LEVELS), "of the passes; '': the process's own")] = ""
    masks: Annotated[str, Name(("", *MASKS), "of the passes; '': the process's own")] = ""
    passes: Annotated[int, Whole("[1, 1e5]", "forward passes", "of a replicate of the design")] = 16
    replicates: Annotated[int, Whole("[1, 1e4]", "replicates", "8 times at most for a width")] = 8
    exact_up_to: Annotated[int, Whole("[0, 15]", "tokens", "answers whose subsets are all run")] = 7
    width: Annotated[float, Real("[0, 1e6]", "nats", "95 % interval to draw for; 0: none")] = 0.0
    check_greedy: Annotated[bool, Plain(bool, "decode to see whether it gives the answer")] = False
    rule: Annotated[str, Plain(str, "decoding rule of hub.RULES; '': the family's")] = ""
    steps: Annotated[int, Whole("[0, 1e6]", "steps", "as of hub.Rule; 0: one a token")] = 0
    block_size: Annotated[int, Whole("[0, 1e6]", "tokens", "filled together; 0: as trained")] = 0
    temperature: Annotated[float, Real("[0, 1e6]", "", "0: the likeliest token")] = 0.0
    top_p: Annotated[float, Real("(0, 1]", "probability", "least mass of the tokens kept")] = 1.0
    guidance: Annotated[float, Real("[0, 1e3]", "", "by the prompt, of generation")] = 0.0
    max_tokens: Annotated[int, Whole("[0, 1e6]", "tokens", "of an answer; 0: the task's")] = 0
    max_length: Annotated[int, Whole("[0, 1e7]", "tokens", "of a row; 0: the model's")] = 0
    truncate: Annotated[bool, Plain(bool, "cut long prompts on the left, else refuse")] = False
    seed: Annotated[int, Whole("[0, 4294967295]", "", "of all noise")] = 0
    rows: Annotated[int, Whole("[1, 1e5]", "rows", "of a pass on each device")] = 8

    def __post_init__(self):
        if self.width and self.replicates < 2:
            raise ValueError(f"width={self.width} needs replicates of 2 or more, got 1")


class Scored(NamedTuple):
    """Estimates of a row, nats [R], one where ``exact``; whether all its tokens are the likeliest.

    The last is known of autoregressive models alone.
    """

    nats: np.ndarray
    exact: bool
    passes: int
    greedy: bool

    @property
    def standard_error(self) -> float:
        """Monte Carlo standard error of the mean; NaN for one replicate."""
        return 0.0 if self.exact else standard_error_of_mean(self.nats)


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
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
            sums = [int(part) for part in jax.device_get(_checksum(leaf))]
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
        estimator, number = self.estimator(settings), len(rows)
        words = np.stack([content_words(settings.seed, 0, content) for content in contents])
        keys = jax.random.wrap_key_data(words, impl="threefry2x32")
        size = settings.rows * self.devices
        options = {"batch_size": size, "pad_id": self.tokenizer.pad_id, "lengths": (length,)}
        draw = likelihood.RowDraws(estimator, self.model.params, rows, keys, **options)

        def checked(own: np.ndarray, first: int, count: int) -> np.ndarray:
            values = draw(own, first, count)
            wrong = ~np.isfinite(values).all(axis=0)
            if wrong.any():
                raise NotFinite(int(own[wrong][0]))
            return values

        if settings.width:
            stop = narrow(settings.replicates, settings.width)
            values = replicate_until(checked, number, each_row(number), stop).row_values
        else:
            values = checked(np.arange(number), 0, settings.replicates)
        wrong = np.ones(number)
        if self.kind == "autoregressive":
            misses = likelihood.RowDraws(self._misses, self.model.params, rows, keys, **options)
            wrong = misses(np.arange(number), 0, 1)[0]
        results = []
        for i, (_, eligible) in enumerate(rows):
            own, eligible = values[~np.isnan(values[:, i]), i], np.asarray(eligible)[None]
            padded = np.pad(eligible, ((0, 0), (0, length - eligible.shape[1])))
            exact = bool(estimator.fixed(padded)[0])
            own = own[:1] if exact else own
            passes = len(own) * int(estimator.views(padded)[0])
            results.append(Scored(own, exact, passes, bool(wrong[i] == 0)))
        return results

    @functools.cached_property
    def _misses(self) -> Estimator:
        """In place of nats, how many tokens of a row are not the likeliest next ones."""

        def other(logits: Array, targets: Array) -> tuple[Array, Array]:
            likeliest = jnp.argmax(exclude_token(logits, self.excluded_id), axis=-1)
            return (likeliest != targets).astype(jnp.float32), jnp.zeros_like(logits)

        @jax.jit
        def score(params, _keys, batch, _replicate, _view):
            readout = self.apply_fn(params, batch.tokens, None, batch.documents)
            wrong = position_losses(other, readout, batch.eligible, batch.tokens)
            return (jnp.sum(wrong, axis=-1),)

        return self.estimator(Settings())._replace(score=score)

    # --- generation ------------------------------------------------------------------------------

    def write(
        self,
        prompts: Sequence[np.ndarray],
        new_tokens: int,
        numbers: np.ndarray,
        settings: Settings,
    ) -> np.ndarray:
        """Continuations [N, new_tokens] of prompts of one bucket (:meth:`room`).

        ``numbers`` [N] key the rows' noise. ValueError as ``hub.generate``.
        """
        size, parts = settings.rows * self.devices, []
        for start in range(0, len(prompts), size):
            own = [*prompts[start : start + size]]
            rows = own + [own[-1]] * (size - len(own))
            keys = _filled(np.asarray(numbers[start : start + size], np.int32), size)
            parts.append(self._write(rows, new_tokens, keys, settings)[: len(own)])
        return np.concatenate(parts)

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

    def _write(self, prompts, new_tokens, numbers, settings) -> np.ndarray:
        length, _ = self.room(max(map(len, prompts)), new_tokens, settings)
        key, codec = jax.random.key(settings.seed), self.tokenizer
        if self.kind in ("masked", "block"):
            ids = {"mask_id": self.mask_id, "eos_id": codec.eos_id, "pad_id": codec.pad_id}
            options = {"key": key, "row_offset": numbers, "stop": False, "pad_multiple": length}
            options["rule"] = self._rule(settings)
            made = generate(self.model, prompts, new_tokens, **options, **ids)
            tokens, written = to_host(made.tokens), made.written
            return np.stack([own[free][:new_tokens] for own, free in zip(tokens, written)])
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
        return tokens[free].reshape(len(prompts), new_tokens)

    def _rule(self, settings: Settings) -> Rule:
        """The decoding rule: by name, or the one that suits the model; ValueError for no name."""
        traits = self.model.traits
        given = as_trained(traits, self.trained_here, self.hidden, self.window or 0)
        given |= {"temperature": settings.temperature, "guidance": settings.guidance}
        given |= {"steps": settings.steps} if settings.steps else {}
        given |= {"block_size": settings.block_size} if settings.block_size else {}
        given |= {"top_p": settings.top_p} if settings.top_p < 1 else {}
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
            **({"width": settings.width} if settings.width else {}),
            "greedy": "checked" if not drawn or settings.check_greedy else "not checked",
            "seed": settings.seed,
        }


class NotFinite(ValueError):
    """Nats of row ``args[0]`` are not finite."""


@jax.jit
def _checksum(leaf: Array) -> tuple[Array, Array]:
    """Two sums modulo 2^32 of an array's bits, the second by position."""
    bits = jax.lax.bitcast_convert_type(leaf, {1: "uint8", 2: "uint16", 4: "uint32"}.get(
        leaf.dtype.itemsize, "uint32")).astype(jnp.uint32)  # fmt: skip
    index, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        step = np.uint32(stride % 2**32)
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * step
        stride *= bits.shape[axis]
    factor = (index ^ (index >> 15)) * np.uint32(0x9E3779B1) | np.uint32(1)
    return jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * factor, dtype=jnp.uint32)


def bucket(length: int, longest: int, multiple: int = 1) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that holds a row, a multiple, at most longest."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    size = -(-size // multiple) * multiple
    return max(min(size, longest), -(-length // multiple) * multiple)


def content_words(seed: int, number: int, ids: np.ndarray) -> np.ndarray:
    """[2] uint32 from the SHA-256 of numbers and token ids: a key's data."""
    digest = hashlib.sha256(f"{seed} {number} ".encode() + np.asarray(ids, "<i4").tobytes())
    return np.frombuffer(digest.digest()[:8], "<u4").astype(np.uint32)


def _filled(values: np.ndarray, size: int) -> np.ndarray:
    """The first axis filled up with copies of the last entry."""
    return np.concatenate([values, np.repeat(values[-1:], size - len(values), axis=0)])
