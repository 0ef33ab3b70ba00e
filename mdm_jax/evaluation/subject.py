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

from mdm_jax import models, samplers, schedules
from mdm_jax.checks import Plain, Real, Whole, checked, unknown_name
from mdm_jax.corruption.process import sum_levels
from mdm_jax.data.tokenizers import Tokenizer
from mdm_jax.distributed import ROW_AXES, spread_rows, to_host
from mdm_jax.draws import Draw
from mdm_jax.estimates import standard_error_of_mean
from mdm_jax.hub import HubModel
from mdm_jax.hub.decoding import generate
from mdm_jax.hub.rules import OF_FAMILY, RULES, Rule
from mdm_jax.likelihood import subsets
from mdm_jax.likelihood.bounds import pass_numbers
from mdm_jax.likelihood.estimators import logsnr_of_count, pass_masks
from mdm_jax.models.cross_entropy import exclude_token, position_losses, token_nats
from mdm_jax.models.masks import check_blocks
from mdm_jax.objectives.losses import uniform_nelbo
from mdm_jax.objectives.objective import Objective
from mdm_jax.schedules import grids, masked
from mdm_jax.types import Array, Batch

Process = Literal["masked", "block", "uniform", "autoregressive"]
DESIGNS = {
    "rotated_counts": subsets.rotated_counts,
    "uniform_counts": subsets.uniform_counts,
    "harmonic_counts": subsets.harmonic_counts,
    "nested_prefixes": lambda _: subsets.nested_prefixes(),
    "one_path": lambda _: subsets.one_path(),
}
"""Designs of masked models by name: ``design(passes)``. A new estimator is a line here."""


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How requests are answered; part of what an answer is known by."""

    design: Literal[
        "rotated_counts", "uniform_counts", "harmonic_counts", "nested_prefixes", "one_path"
    ] = "rotated_counts"
    passes: Annotated[int, Whole("[1, 1e5]", "forward passes", "of a replicate of the design")] = 16
    replicates: Annotated[int, Whole("[1, 1e4]", "replicates", "of the design, for errors")] = 8
    exact_up_to: Annotated[int, Whole("[0, 15]", "tokens", "answers whose subsets are all run")] = 7
    check_greedy: Annotated[bool, Plain(bool, "decode to see whether it gives the answer")] = False
    rule: Annotated[str, Plain(str, "decoding rule of hub.RULES; '': the family's")] = ""
    steps: Annotated[int, Whole("[0, 1e6]", "steps", "of an answer; 0: one a token")] = 0
    block_size: Annotated[int, Whole("[0, 1e6]", "tokens", "filled together; 0: as trained")] = 0
    temperature: Annotated[float, Real("[0, 1e6]", "", "0: the likeliest token")] = 0.0
    top_p: Annotated[float, Real("(0, 1]", "probability", "least mass of the tokens kept")] = 1.0
    guidance: Annotated[float, Real("[0, 1e3]", "", "by the prompt, of generation")] = 0.0
    max_tokens: Annotated[int, Whole("[0, 1e6]", "tokens", "of an answer; 0: the task's")] = 0
    max_length: Annotated[int, Whole("[0, 1e7]", "tokens", "of a row; 0: the model's")] = 0
    truncate: Annotated[bool, Plain(bool, "cut long prompts on the left, else refuse")] = False
    seed: Annotated[int, Whole("[0, 4294967295]", "", "of all noise")] = 0
    rows: Annotated[int, Whole("[1, 1e5]", "rows", "of a pass on each device")] = 8


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
        rule = RULES.get(OF_FAMILY.get(self.model.family.name, "dllm"))
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

    def design(self, settings: Settings) -> subsets.SubsetDesign | None:
        """That of masked models."""
        if self.kind != "masked":
            return None
        chosen = DESIGNS[settings.design](settings.passes)
        limit = settings.exact_up_to
        return subsets.exact_when_short(chosen, limit) if limit else chosen

    def runs(self, tokens: int, settings: Settings) -> tuple[int, int, bool]:
        """(replicates, passes, whether it is exact) of an answer of so many tokens."""
        if self.kind == "autoregressive" or (self.kind == "block" and self.multiple == 1):
            return 1, 1, True
        design = self.design(settings)
        if design is None:
            return settings.replicates, settings.passes, False
        exact = design.fixed(tokens)
        return 1 if exact else settings.replicates, design.passes(tokens), exact

    def score(
        self, rows: Batch, contents: Sequence[np.ndarray], settings: Settings
    ) -> list[Scored]:
        """Nats of the eligible tokens of rows [N, L] of NumPy arrays, given the others.

        Noise of a row and replicate is keyed by the seed and the row's ``contents``, token ids;
        rows with the same have common noise. ValueError with the number of a row not finite.
        """
        program = self._program(settings)
        runs = [self.runs(int(size), settings) for size in rows.eligible.sum(1)]
        items, views, words = [], [], []
        for i, (replicates, passes, _) in enumerate(runs):
            items += [i] * (replicates * passes)
            views += [*range(passes)] * replicates
            for replicate in range(replicates):
                words += [content_words(settings.seed, replicate, contents[i])] * passes
        keyed = (*(field[items] for field in rows[:3]), np.array(words), np.array(views, np.int32))
        size, parts = settings.rows * self.devices, []
        for start in range(0, len(items), size):
            part = [_filled(field[start : start + size], size) for field in keyed]
            parts.append(program(self.model.params, *spread_rows(part, self.model.params)))
        nats, greedy = (np.concatenate(each) for each in zip(*to_host(parts)))
        results, first = [], 0
        for i, (replicates, passes, exact) in enumerate(runs):
            own = slice(first, first := first + replicates * passes)
            estimates = nats[own].astype(np.float64).reshape(replicates, passes).sum(1)
            if not np.all(np.isfinite(estimates)):
                raise NotFinite(i)
            results.append(Scored(estimates, exact, replicates * passes, bool(greedy[own].all())))
        return results

    def _program(self, settings: Settings) -> Callable[..., tuple[Array, Array]]:
        """``program(params, tokens [B, L], eligible, documents, words [B, 2], view [B])``: each
        item's share of the estimate, and whether all its tokens are the likeliest, [B]."""
        names = ("design", "passes", "exact_up_to")
        wanted = tuple(getattr(settings, name) for name in names)
        if wanted not in (cache := self.__dict__.setdefault("_programs", {})):
            estimate = {
                "masked": self._masked,
                "block": self._block,
                "uniform": self._uniform,
                "autoregressive": self._causal,
            }[self.kind]

            if self.kind == "uniform":
                self._objective  # noqa: B018  (its law cannot be made while tracing)

            @jax.jit
            def program(params, tokens, eligible, documents, words, view):
                keys = jax.random.wrap_key_data(words, impl="threefry2x32")
                return estimate(params, Batch(tokens, eligible, documents, view), keys, settings)

            cache[wanted] = program
        return cache[wanted]

    def _masked(self, params, rows, keys, settings):
        tokens, eligible, documents, view = rows
        design = self.design(settings)

        def draw(key, eligible, view):
            return tuple(part[0] for part in design.draw(key[None], eligible[None], view))

        mask, weight = jax.vmap(draw)(keys, eligible, view)
        count = jnp.maximum(jnp.sum(mask, axis=-1), 1)
        logsnr = logsnr_of_count(count, jnp.sum(eligible, axis=-1))[:, None]
        outputs = self.apply_fn(params, jnp.where(mask, self.mask_id, tokens), logsnr, documents)
        nats = token_nats(outputs, tokens, mask, self.excluded_id)
        return jnp.sum(weight * nats, axis=-1), jnp.zeros(len(tokens), bool)

    def _block(self, params, rows, keys, settings):
        tokens, eligible, documents, view = rows
        num_rows, size = len(tokens), self.multiple
        blocks = check_blocks(tokens.shape[1], size)
        parts = eligible.reshape(num_rows, blocks, size)

        def draw(key, eligible, view):
            return pass_masks(jax.random.split(key, blocks), eligible, view, settings.passes)

        count = jnp.ones(parts.shape[:2], jnp.int32)
        mask, weight = parts, 1.0
        if size > 1:
            mask, count = jax.vmap(draw)(keys, parts, view)
            weight = jnp.sum(parts, axis=-1) / (count * settings.passes)
        mask = mask.reshape(tokens.shape)
        logsnr = logsnr_of_count(count, jnp.sum(parts, axis=-1))
        inputs = jnp.concatenate([jnp.where(mask, self.mask_id, tokens), tokens], axis=-1)
        outputs = self.apply_fn(params, inputs, logsnr, documents)
        nats = sum_levels(token_nats(outputs, tokens, mask, self.excluded_id), blocks)
        return jnp.sum(weight * nats, axis=-1), jnp.zeros(num_rows, bool)

    def _uniform(self, params, rows, keys, settings):
        objective, passes, length = self._objective, settings.passes, rows.tokens.shape[1]
        u, noise = jax.vmap(lambda key, view: pass_numbers(key, view, passes, length))(
            keys, rows.units
        )
        u = u[None, :, None]
        draw = Draw(u, jnp.zeros_like(u), noise[None])
        stats = objective.loss(lambda *inputs: self.apply_fn(params, *inputs), rows, draw)
        return (stats.weight * stats.raw)[0, :, 0] / passes, jnp.zeros(len(keys), bool)

    @functools.cached_property
    def _objective(self) -> Objective:
        """The bound of uniform noise, levels as of ``make_uniform_likelihood``."""
        return uniform_nelbo(self.num_tokens, schedules.law_of(masked.power(3.0)))

    def _causal(self, params, rows, _keys, _settings):
        tokens, eligible, documents, _ = rows
        readout = self.apply_fn(params, tokens, None, documents)
        nats = token_nats(readout, tokens, eligible, self.excluded_id)

        def other(logits, targets):
            likeliest = jnp.argmax(exclude_token(logits, self.excluded_id), axis=-1)
            return (likeliest != targets).astype(jnp.float32), jnp.zeros_like(logits)

        wrong = position_losses(other, readout, eligible, tokens)
        return jnp.sum(nats, axis=-1), jnp.sum(wrong, axis=-1) == 0

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
        """The decoding rule: by name, or that of the family, unless it was trained in blocks that
        the family's own loop does not know. ValueError for an unknown name."""
        name = settings.rule or OF_FAMILY.get(self.model.family.name, "dllm")
        if name not in RULES:
            raise unknown_name(name, RULES, "decoding rule")
        if not settings.rule and name == "bd3lm" and self.kind != "block":
            name = "mdlm"
        if not settings.rule and self.kind == "block" and not RULES[name].cached:
            name = "dllm_blocks"
        given = {"temperature": settings.temperature, "guidance": settings.guidance}
        given |= {"steps": settings.steps} if settings.steps else {}
        given |= {"block_size": settings.block_size} if settings.block_size else {}
        given |= {"top_p": settings.top_p} if settings.top_p < 1 else {}
        given |= (
            {"excludes_mask": True, "suppress_tokens": self.hidden} if self.trained_here else {}
        )
        given |= {"window": self.window * self.multiple} if self.window else {}
        if given.get("window"):
            given.setdefault("block_size", self.multiple)
        return dataclasses.replace(RULES[name], **given)

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
        design = {
            "masked": f"{settings.design}; all subsets up to {settings.exact_up_to} tokens",
            "block": "counts even over a block, exact over blocks",
            "uniform": "levels in strata",
            "autoregressive": "exact",
        }[self.kind]
        drawn = self.kind != "autoregressive"
        return {
            "process": self.kind,
            "family": self.model.family.name,
            "parameters": self.parameters,
            "dtype": np.dtype(self.model.config.dtype).name,
            "scored": "tokens of the continuation, given the context and their number; BOS, EOS "
            "and padding are not scored, padding is hidden",
            "mask_token": "no probability" if self.excluded_id is not None else "in the softmax",
            "rates": "all" if drawn else "none",
            "design": design,
            "passes": settings.passes if drawn else 1,
            "replicates": settings.replicates if drawn else 1,
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
