"""Decoding rules of the families as data, the counts of their loops, and samplers made of them."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax import samplers
from mdm_jax.checks import Plain, Real, Whole, checked, unknown_name
from mdm_jax.draws import open_uniform
from mdm_jax.hub.family import Traits
from mdm_jax.hub.model import HubModel
from mdm_jax.models.cross_entropy import exclude_token
from mdm_jax.samplers import Sampler, StepContext, filters
from mdm_jax.samplers.by_score import (
    Count,
    best_positions,
    confident_positions,
    in_blocks,
    kept_count,
    order_noise,
    running_sums,
    token_probability,
)
from mdm_jax.samplers.sampler import row_streams
from mdm_jax.types import Array, ArrayLike

Ids = functools.partial(Whole, "[0, 2e9]", "tokens", several=True)

Schedule = Literal["llada", "dllm", "sdar", "dream", "ancestral", "first_hitting"]
Score = Literal["confidence", "margin", "negative_entropy", "random", "first"]


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """How a model is decoded.

    Attributes:
        schedule: tokens per pass. ``llada``: :func:`llada_counts` of a block's masks; ``dllm``:
            :func:`dllm_counts` of them; ``sdar``: :func:`llada_counts` of the block's size;
            ``dream``: :func:`dream_shares` of the masks that a row has on average over the batch;
            ``ancestral``: each mask by itself (MDLM, and Dream's "origin"); ``first_hitting``: one
            at a time, at random (BD3-LM).
        steps: passes over all blocks, an equal number for each (rounded up); of one block if
            ``cached``. None: one per token.
        block_size: tokens filled together, left to right; None: the model's own, or all.
        score: highest are filled first. ``confidence``: probability of the token drawn; ``margin``;
            ``negative_entropy``; ``random``; ``first``: from left to right.
        filtered: scores are of the distribution that tokens are drawn from (with temperature 0:
            that of temperature 1), as with Dream and SDAR; LLaDA and dllm take the network's.
        threshold: fill all positions of a higher score, if there are as many as the schedule asks
            for (SDAR's low_confidence_dynamic); None: always as many as it asks for. With a step
            for each token (``steps`` None) that is Fast-dLLM's rule: at least one.
        factor: as ``threshold``, the n likeliest with ``(n + 1)(1 - p_n) < factor`` (Fast-dLLM);
            needs the score ``confidence``. 0: none.
        entropy_bound: fill by rising entropy as many positions as have less than this together, at
            least one (entropy_bounded of SDAR's JetEngine), whatever the schedule asks for; needs
            the score ``negative_entropy``. None: no bound.
        approximation: an approximate KV cache of a bidirectional model: ``prefix``, ``dual`` or
            ``delayed`` (``samplers.ApproximateCache``); "": none.
        refresh: steps between passes over all positions; None: at the first step of a block.
        random_counts: the schedule ``dllm`` fills each mask left with the share's probability, so
            that counts are binomial (stochastic_transfer).
        temperature, top_k, top_p: of tokens; 0: the most likely.
        order_temperature: positions are drawn in proportion to ``exp(score / temperature)``
            (Dream's alg_temp).
        suppress_tokens: have no probability (as in dllm).
        begin_suppress_tokens: scores are of the distribution without these, so that positions for
            which they are drawn are filled last (as in dllm).
        guidance: logits ``u + (guidance + 1)(c - u)``, with u for given tokens masked (cfg_scale).
        guidance_keep: given tokens that u keeps, wherever they stand (cfg_keep_tokens).
        padding: where rows of a batch are filled up. ``right``: after the masks; ``left``: before
            the prompt, positions counting from the first token of the prompt.
        cached: blocks are read once when they are finished, and no block sees later ones. The
            prompt is padded on the left to whole blocks, or on the right the last block is filled
            whole, so that more tokens may be generated than asked for.
        stop_entropy: a cached row ends before its last 256 tokens where their empirical entropy is
            less, in nats (of more than 256 tokens; where ``stop`` is on, the rest is EOS); None:
            nowhere.
        window: tokens that a cached block attends to, itself included, a multiple of block_size.
            None: the length of its training for BD3-LM, whose cache slides; else all.
        excludes_mask: the mask token has no probability (MDLM, BD3-LM). Elsewhere a network may
            predict it; such a position stays masked for later steps, which fill no more tokens for
            it, and the result may hold mask tokens.
        largest_rate, smallest_time: masking rates ``largest_rate t`` for t even in
            [smallest_time, 1], of ``ancestral`` and ``dream``.
    """

    schedule: Schedule
    steps: Annotated[int, Whole("[1, 1e6]", "steps")] | None = None
    block_size: Annotated[int, Whole("[1, 1e6]", "tokens", "filled together")] | None = None
    score: Score = "confidence"
    filtered: Annotated[bool, Plain(bool, "scores of the distribution drawn from")] = False
    threshold: Annotated[float, Real("[-1e3, 1]", "", "of scores")] | None = None
    factor: Annotated[float, Real("[0, 1e3]", "", "in place of the threshold; 0: none")] = 0.0
    entropy_bound: Annotated[float, Real("[0, 1e6]", "nats", "of a step")] | None = None
    approximation: Literal["", "prefix", "dual", "delayed"] = ""
    refresh: Annotated[int, Whole("[1, 1e6]", "steps", "of an approximation")] | None = None
    random_counts: Annotated[bool, Plain(bool, "counts of a step are binomial")] = False
    temperature: Annotated[float, Real("[0, 1e6]", "", "0: the most likely token")] = 0.0
    top_k: Annotated[int, Whole("[1, 2e9]", "tokens", "likely ones kept")] | None = None
    top_p: Annotated[float, Real("(0, 1]", "probability", "least mass of the tokens kept")] = 1.0
    order_temperature: Annotated[float, Real("[0, 1e6]", "", "of positions")] = 0.0
    suppress_tokens: Annotated[tuple[int, ...], Ids("never predicted")] = ()
    begin_suppress_tokens: Annotated[tuple[int, ...], Ids("filled last")] = ()
    guidance: Annotated[float, Real("[0, 1e3]", "", "by given tokens; 0: none")] = 0.0
    guidance_keep: Annotated[tuple[int, ...], Ids("that guidance does not mask")] = ()
    padding: Literal["left", "right"] = "right"
    window: Annotated[int, Whole("[1, 1e9]", "tokens", "a block attends to")] | None = None
    cached: Annotated[bool, Plain(bool, "finished blocks are cached")] = False
    stop_entropy: Annotated[float, Real("[0, 1e3]", "nats", "of 256 tokens")] | None = None
    excludes_mask: Annotated[bool, Plain(bool, "the mask token is never predicted")] = False
    largest_rate: Annotated[float, Real("(0, 1]", "masking rate")] = 1.0
    smallest_time: Annotated[float, Real("(0, 1)", "time")] = 1e-3

    def __post_init__(self):
        for name in ("suppress_tokens", "begin_suppress_tokens", "guidance_keep"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # a list cannot be hashed
        scored = self.schedule not in ("ancestral", "first_hitting")
        read = (self.score, self.threshold, self.steps, self.order_temperature)
        if self.entropy_bound is not None and (
            read != ("negative_entropy", None, None, 0) or not scored or self.schedule == "dream"
        ):
            raise ValueError(
                "entropy_bound says how many positions a step fills: it needs "
                "score='negative_entropy', threshold=None, steps=None, order_temperature=0 and a "
                f"schedule that counts a block's tokens; got {self}"
            )
        if self.random_counts and (self.schedule != "dllm" or self.entropy_bound is not None):
            raise ValueError(
                "random_counts is read by the schedule 'dllm' without entropy_bound, got "
                f"schedule={self.schedule}, entropy_bound={self.entropy_bound}"
            )
        if self.factor and (self.score != "confidence" or self.threshold is not None or not scored):
            raise ValueError(
                "factor is read with score='confidence', threshold=None and a schedule that counts "
                f"tokens; got {self}"
            )
        if (self.refresh and not self.approximation) or (
            self.approximation and (self.cached or self.guidance)
        ):
            raise ValueError(
                "approximation is of rules with cached=False (those have an exact cache) and no "
                f"guidance, and refresh is read with it alone; got {self}"
            )
        if self.begin_suppress_tokens and (not scored or self.score in ("random", "first")):
            raise ValueError(
                "begin_suppress_tokens is read by scores of tokens alone: confidence, margin or "
                f"negative_entropy; got score={self.score}, schedule={self.schedule}"
            )
        if self.guidance_keep and not self.guidance:
            raise ValueError("guidance_keep is read with guidance alone: set guidance, or leave it")
        if self.stop_entropy is not None and not self.cached:
            raise ValueError("stop_entropy ends rows of blocks: it needs a rule with cached=True")
        if self.window and (not self.cached or self.window % (self.block_size or self.window)):
            raise ValueError(
                "window, of a rule with cached=True, must be a multiple of block_size; got "
                f"{self.window}, cached={self.cached}, block_size={self.block_size}"
            )


_DREAM = {"filtered": True, "padding": "left"}
_EXACT = {"temperature": 1.0, "excludes_mask": True}

RULES = {
    "llada": Rule(schedule="llada", padding="left"),
    "dllm": Rule(schedule="dllm"),
    "dllm_blocks": Rule(schedule="dllm", cached=True, padding="left"),
    "dllm_dream": Rule(schedule="dllm", **_DREAM),
    "dream": Rule(schedule="dream", **_DREAM),
    "dream_origin": Rule(schedule="ancestral", **_DREAM),
    "sdar": Rule(schedule="sdar", cached=True, filtered=True, threshold=0.85, temperature=1.0),
    "mdlm": Rule(schedule="ancestral", largest_rate=1 - 1e-3, smallest_time=1e-5, **_EXACT),
    "mdlm_greedy": Rule(schedule="dllm", excludes_mask=True),
    "bd3lm": Rule(schedule="first_hitting", cached=True, stop_entropy=4.0, **_EXACT),
    "bd3lm_greedy": Rule(schedule="llada", cached=True, excludes_mask=True),
}
"""Loops by name: ``generate()`` of LLaDA; ``MDLMSampler``, ``BD3LMSampler`` (left-padded blocks)
and ``DreamSampler`` of dllm; Dream's ``diffusion_generate``, and its algorithm "origin"; SDAR's
``block_diffusion_generate`` (low_confidence_dynamic; ``threshold=None`` is low_confidence_static,
with ``score="first"`` sequential); MDLM's ancestral and BD3-LM's first-hitting sampler, and greedy
loops over their probabilities, which these repositories do not have."""

OF_FAMILY = {name: name for name in ("llada", "dream", "sdar", "mdlm", "bd3lm")}
INFILLING = {"dream": "dllm_dream", "mdlm": "mdlm", "bd3lm": "bd3lm"}
"""Rules of families where none is given, ``dllm`` of the others."""


def find_rule(
    family: str,
    traits: Traits,
    rule: Rule | str | None = None,
    of_family: Mapping[str, str] = OF_FAMILY,
) -> Rule:
    """The rule that is meant: itself, by name, or None for the one that suits the model.

    That is the one of its family, but one with a cache for a model of blocks, and MDLM's for one of
    BD3-LM's family without blocks. ValueError for an unknown name.
    """
    if isinstance(rule, Rule):
        return rule
    if rule is not None:
        if rule not in RULES:
            raise unknown_name(rule, RULES, "decoding rule")
        return RULES[rule]
    name, in_blocks = of_family.get(family, "dllm"), traits.attention == "block"
    if name == "bd3lm" and not in_blocks:
        name = "mdlm"
    return RULES["dllm_blocks" if in_blocks and not RULES[name].cached else name]


def as_trained(
    traits: Traits, trained_here: bool, hidden: tuple[int, ...] = (), window: int = 0
) -> dict[str, Any]:
    """Changes of a rule for a model by how it was trained.

    Args:
        trained_here: by an objective that never lets the mask token be predicted.
        hidden: ids that no row of its data holds, read if ``trained_here``.
        window: blocks that a block attends to, itself included; 0: all.
    """
    changes: dict[str, Any] = {}
    if trained_here:
        changes |= {"excludes_mask": True, "suppress_tokens": hidden}
    if window:
        size = traits.block_size
        changes |= {"block_size": size, "window": window * size}
    return changes


def check_rule(model: HubModel, rule: Rule, mask_id: int | None, trace: bool = False) -> None:
    """ValueError unless the rule can decode the model."""
    traits, name = model.traits, model.family.name
    if traits.attention == "causal":
        raise ValueError(
            f"{name} is a causal model: decode it token by token with samplers.sample_next_tokens, "
            "or load it as the A2D model of its kind and train it"
        )
    if mask_id is None:
        raise ValueError(
            f"the config.json of this {name} model names no mask token: give mask_id, the id that "
            "its tokenizer has for it (models without one, Duo and UDLM, cannot be decoded so)"
        )
    if not 0 <= mask_id < traits.vocab_size:
        raise ValueError(f"mask_id must be in [0, {traits.vocab_size}), got {mask_id}")
    if rule.cached and (traits.shift or rule.guidance or trace or rule.schedule == "dream"):
        raise ValueError(
            "a rule with a cache knows no guidance, no trace, no schedule 'dream' and no model "
            f"with shifted logits; got guidance={rule.guidance}, trace={trace}, "
            f"schedule={rule.schedule}, shift={traits.shift}"
        )
    if traits.attention == "block" and not rule.cached:
        raise ValueError(
            f"a {name} model generates block by block: choose a rule with cached=True, such as "
            "sdar, bd3lm or dllm_blocks"
        )
    if rule.cached and rule.block_size is None and traits.block_size is None:
        raise ValueError(f"this {name} model states no block_size: give the one it was trained on")
    for setting in ("suppress_tokens", "begin_suppress_tokens", "guidance_keep"):
        if any(token >= traits.vocab_size for token in getattr(rule, setting)):
            raise ValueError(
                f"{setting} must be in [0, {traits.vocab_size}), got {getattr(rule, setting)}"
            )


# --- tokens per step, in NumPy, rounded as the loops round them ---------------------------------


def llada_counts(masks: ArrayLike, steps: int) -> np.ndarray:
    """[..., steps] tokens per step of LLaDA: ``n // steps``, one more in the first ``n % steps``.

    Zeros are steps that fill nothing; they are skipped here, and cost a pass in the original.
    """
    masks = np.asarray(masks)[..., None]
    return masks // steps + (np.arange(steps) < masks % steps)


def dllm_counts(masks: ArrayLike, steps: int) -> np.ndarray:
    """[..., steps] tokens per step of dllm with its linear schedule, zeros moved to the end.

    ``round(left p)`` of the masks left, ``p = 1 - (1 - alpha(s)) / (1 - alpha(t))`` with alpha in
    float32, the product in float64, half to even: not the counts of LLaDA, and not as even.
    """
    left = np.asarray(masks, np.int64).copy()
    counts = np.zeros((*left.shape, steps), np.int64)
    time = (np.arange(steps, -1, -1) / steps).astype(np.float32)
    rate = np.float32(1) - (np.float32(1) - time)
    for j in range(steps):
        share = 1 - float(rate[j + 1] / rate[j])
        counts[..., j] = np.minimum(np.round(left * share).astype(np.int64), left)
        left -= counts[..., j]
    order = np.argsort(counts == 0, axis=-1, kind="stable")
    return np.take_along_axis(counts, order, axis=-1)


def dream_shares(steps: int, smallest_time: float = 1e-3) -> np.ndarray:
    """[steps] float32 shares of the masks left that Dream fills, rounded down; all in the last."""
    time = even_times(steps, smallest_time)
    return np.append(1 - time[1:-1] / time[:-2], np.float32(1))


def even_times(steps: int, smallest_time: float) -> np.ndarray:
    """[steps + 1] float32 times from 1 down to the smallest, as torch.linspace rounds them."""
    last = np.float32(smallest_time)
    index, step = np.arange(steps + 1, dtype=np.float32), (last - np.float32(1)) / np.float32(steps)
    first_half = index < (steps + 1) // 2
    return np.where(first_half, 1 + step * index, last - step * (steps - index)).astype(np.float32)


# --- rules as samplers ------------------------------------------------------------------------


def make_sampler(
    rule: Rule, num_blocks: int, in_columns: bool = False, alone: bool = False
) -> tuple[Sampler, np.ndarray | None]:
    """The sampler of a rule with a ``block_size``, and its grid of noise levels, if it has one.

    ``in_columns``: blocks are ``block_size`` columns of the canvas, not that many masked positions.
    ``alone``: the schedule "dream" counts the masks of each row, as if it were the only one.
    """
    steps = rule.steps or rule.block_size * (1 if rule.cached else num_blocks)
    steps = steps if rule.cached else -(-steps // num_blocks)
    chain = [
        samplers.top_p(rule.top_p) if rule.top_p < 1 else None,
        samplers.top_k(rule.top_k) if rule.top_k else None,
    ]
    if rule.temperature > 0:
        chain.insert(0, samplers.temperature(rule.temperature))
    distribution = samplers.compose(*filter(None, chain))
    greedy = samplers.temperature(0.0)
    drawn_from = distribution if rule.temperature > 0 else greedy
    grid = None
    if rule.schedule == "ancestral":
        rates = even_times(steps * num_blocks, rule.smallest_time) * np.float64(rule.largest_rate)
        with np.errstate(divide="ignore"):  # -inf where everything is masked
            grid = np.append(np.log1p(-rates[:-1]) - np.log(rates[:-1]), np.inf)
        sampler = samplers.ancestral(drawn_from)._replace(excludes_mask=rule.excludes_mask)
    elif rule.schedule == "first_hitting":
        sampler = samplers.first_hitting(drawn_from)._replace(excludes_mask=rule.excludes_mask)
    else:
        steps, count = _counts(rule, steps, alone)
        sampler = in_blocks(
            f"{rule.schedule} {rule.score}",
            rule.block_size,
            steps,
            functools.partial(_preference, rule, distribution if rule.filtered else None),
            drawn_from,
            parts=functools.partial(_columns, rule.block_size) if in_columns else None,
            count=count,
            best=functools.partial(_best, rule),
            excludes_mask=rule.excludes_mask,
        )
        sampler = sampler._replace(num_steps=lambda _: steps * (1 if rule.cached else num_blocks))
    if rule.guidance:
        guidance = samplers.prompt_guidance(rule.guidance + 1, rule.guidance_keep)
        sampler = samplers.wrapped(sampler, guidance)
    return sampler, grid


def _columns(block_size: int, free: Array, block: Array) -> tuple[Array, Array]:
    of_block = free & (jnp.arange(free.shape[-1])[None] // block_size == block)
    return of_block, of_block


def _preference(
    rule: Rule,
    distribution: filters.LogitFilter | None,
    context: StepContext,
    logits: Array,
    drawn: Array,
    positions: Array | None,
) -> Array:
    logits = exclude_token(logits, *rule.begin_suppress_tokens)
    logits = logits if distribution is None else distribution(logits)
    if rule.score == "random":
        return order_noise(context, positions, open_uniform)
    if rule.score == "first":
        return jnp.zeros(drawn.shape)
    if rule.score == "margin":
        score = samplers.margin(logits)
    elif rule.score == "negative_entropy":
        probs = jax.nn.softmax(logits, axis=-1)
        score = jnp.sum(probs * jnp.log(probs + 1e-10), axis=-1)
    else:
        score = token_probability(logits, drawn)
    if rule.order_temperature:
        gumbel = functools.partial(jax.random.gumbel, mode="high")
        score = score / rule.order_temperature + order_noise(context, positions, gumbel)
    return score


def _best(rule: Rule, score: Array, candidates: Array, count: Array) -> Array:
    if rule.entropy_bound is not None:
        first = best_positions(score, candidates, jnp.ones_like(count))
        within = running_sums(-score, candidates) < rule.entropy_bound
        return candidates & (within | first)
    if rule.threshold is None and not rule.factor:
        return best_positions(score, candidates, count)
    return confident_positions(score, candidates, count, rule.threshold, rule.factor)


def _counts(rule: Rule, steps: int, alone: bool) -> tuple[int, Count]:
    """Steps of a block, and its ``count`` for ``samplers.by_score.in_blocks``."""
    if rule.random_counts:

        def binomial(context: StepContext, total: Array, left: Array, step: Array) -> Array:
            del total
            shape = left.shape[1:]
            keys = row_streams(context.keys, "count")
            uniform = jax.vmap(lambda key: open_uniform(key, shape))(keys)
            return jnp.sum(left & (uniform * jnp.reshape(steps - step, (-1, 1)) < 1), axis=-1)

        return steps, binomial
    if rule.schedule == "dllm":
        table = dllm_counts(np.arange(rule.block_size + 1), steps)
        table = table[:, table.any(axis=0)].astype(np.int32)

        def tabled(context: StepContext, total: Array, left: Array, step: Array) -> Array:
            del context, left
            return jnp.asarray(table)[total, step]

        return table.shape[1], tabled
    if rule.schedule == "dream":
        shares = dream_shares(steps, rule.smallest_time)

        def shared(context: StepContext, total: Array, left: Array, step: Array) -> Array:
            del context
            mean = jnp.sum(left, axis=-1).astype(jnp.float32)
            mean = mean if alone else jnp.sum(left) / jnp.float32(left.shape[0])
            count = jnp.floor(mean * jnp.asarray(shares)[step])
            return jnp.broadcast_to(count.astype(total.dtype), total.shape)

        return steps, shared

    def even(context: StepContext, total: Array, left: Array, step: Array) -> Array:
        del context, left
        of = jnp.full_like(total, rule.block_size) if rule.schedule == "sdar" else total
        return kept_count(of, step, steps)

    return steps, even


def ancestral_step(
    log_probs: Array,
    tokens: Array,
    mask_id: int,
    time: ArrayLike,
    next_time: ArrayLike,
    uniforms: Array,
    eps: float = 1e-3,
) -> Array:
    """MDLM's step from ``time`` to ``next_time`` by given uniforms [N, L, K], as in its code.

    ``argmax q / (1e-10 - log(u + 1e-10))`` of q(token) = p(token) times the masking rates'
    difference, q(mask) = the next rate, at rates ``(1 - eps) t``; log_probs [N, L, K] without the
    mask token. Float32 uniforms cut the tail like a lower temperature would; ``samplers.ancestral``
    (rule "mdlm") has the law that this is meant to have.
    """
    rate, next_rate = ((1 - eps) * jnp.float32(t) for t in (time, next_time))
    weights = (jnp.exp(log_probs) * (rate - next_rate)).at[..., mask_id].set(next_rate)
    drawn = jnp.argmax(weights / (1e-10 - jnp.log(uniforms + 1e-10)), axis=-1).astype(tokens.dtype)
    return jnp.where(tokens == mask_id, drawn, tokens)
