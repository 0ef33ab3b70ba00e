"""Decoding as the families' own loops do it: one generator, the rules of the loops as data.

The loops differ in how many tokens a pass fills (schedule), which (score), where the padding of a
batch is, and whether finished blocks are cached; a :class:`Rule` says so. They run as samplers
(``samplers.by_score.in_blocks``, ``samplers.sample_blocks``): one compiled program, no step on the
host. With temperature 0 and in float32, tokens are those of the originals, one by one. With a
temperature the law is the same, the random numbers are not.

Where an original overwrites tokens that were given, this does not: SDAR's loop does if a step's
quota exceeds the masks left in its block, Dream's if rows of a batch have different numbers of
masks.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax import samplers
from mdm_jax.checks import Plain, Real, Whole, checked, unknown_name
from mdm_jax.draws import open_uniform
from mdm_jax.hub.counts import dllm_counts, dream_shares, even_times
from mdm_jax.hub.family import Traits
from mdm_jax.hub.model import HubModel
from mdm_jax.models.decoders import cached_block_decoder
from mdm_jax.samplers import Sampler, StepContext, filters
from mdm_jax.samplers.by_score import best_positions, in_blocks, kept_count, token_probability
from mdm_jax.samplers.sampler import row_streams
from mdm_jax.types import Array, ArrayLike, PyTree

Schedule = Literal["llada", "dllm", "sdar", "dream", "ancestral", "first_hitting"]
Score = Literal["confidence", "margin", "negative_entropy", "random", "first"]
Show = Callable[[np.ndarray], None]


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
            for (SDAR's low_confidence_dynamic); None: always as many as it asks for.
        temperature, top_k, top_p: of tokens; 0: the most likely.
        order_temperature: positions are drawn in proportion to ``exp(score / temperature)``
            (Dream's alg_temp).
        guidance: logits ``u + (guidance + 1)(c - u)``, with u for the prompt masked (cfg_scale).
        padding: where rows of a batch are filled up. ``right``: after the masks; ``left``: before
            the prompt, positions counting from the first token of the prompt.
        cached: blocks are read once when they are finished, and no block sees later ones. The
            prompt is padded on the left to whole blocks, or on the right the last block is filled
            whole, so that more tokens may be generated than asked for.
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
    temperature: Annotated[float, Real("[0, 1e6]", "", "0: the most likely token")] = 0.0
    top_k: Annotated[int, Whole("[1, 2e9]", "tokens", "likely ones kept")] | None = None
    top_p: Annotated[float, Real("(0, 1]", "probability", "least mass of the tokens kept")] = 1.0
    order_temperature: Annotated[float, Real("[0, 1e6]", "", "of positions")] = 0.0
    guidance: Annotated[float, Real("[0, 1e3]", "", "by the prompt; 0: none")] = 0.0
    padding: Literal["left", "right"] = "right"
    cached: Annotated[bool, Plain(bool, "finished blocks are cached")] = False
    excludes_mask: Annotated[bool, Plain(bool, "the mask token is never predicted")] = False
    largest_rate: Annotated[float, Real("(0, 1]", "masking rate")] = 1.0
    smallest_time: Annotated[float, Real("(0, 1)", "time")] = 1e-3


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
    "bd3lm": Rule(schedule="first_hitting", cached=True, **_EXACT),
    "bd3lm_greedy": Rule(schedule="llada", cached=True, excludes_mask=True),
}
"""Loops by name: ``generate()`` of LLaDA; ``MDLMSampler``, ``BD3LMSampler`` (left-padded blocks)
and ``DreamSampler`` of dllm; Dream's ``diffusion_generate``, and its algorithm "origin"; SDAR's
``block_diffusion_generate`` (low_confidence_dynamic; ``threshold=None`` is low_confidence_static,
with ``score="first"`` sequential); MDLM's ancestral and BD3-LM's first-hitting sampler, and greedy
loops over their probabilities, which these repositories do not have."""

_OF_FAMILY = {name: name for name in ("llada", "dream", "sdar", "mdlm", "bd3lm")}


class Generated(NamedTuple):
    """Tokens [B, L] int32 with prompts and padding; ``written`` [B, L] bool, those generated.

    ``canvases`` [S, B, L]: tokens after every step, if asked for.
    """

    tokens: Array
    written: np.ndarray
    canvases: Array | None


def generate(
    model: HubModel,
    prompts: Sequence[ArrayLike],
    max_new_tokens: int = 128,
    *,
    rule: Rule | str | None = None,
    key: Array | None = None,
    mask_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
    stop: bool = True,
    pad_multiple: int = 1,
    trace: bool = False,
    show: Show | None = None,
    **changes: Any,
) -> Generated:
    """Continue prompts by a family's decoding rule.

    Compiled once per rule and shape. ``generate(model, prompts, 64, steps=32, block_size=32)``.

    Args:
        prompts: token ids of each row, of any lengths; a model with shifted logits (Dream) needs at
            least a BOS.
        max_new_tokens: of every row.
        rule: a name of :data:`RULES` or a rule; None: that of the model's family.
        changes: settings of the rule to replace.
        key: typed key; None: ``jax.random.key(0)``. Rows draw from keys of their own.
        mask_id, eos_id, pad_id: where config.json does not say (A2D and LLaDA-MoE keep them in the
            tokenizer).
        stop: rules with a cache: after a block with which every row has an EOS, the rest is EOS.
        pad_multiple: rows are filled up to a multiple of this length, so that prompts of many
            lengths run in few programs; the padding is not returned.
        trace: return the tokens after every step (not with a cache).
        show: called on the host after every step with the tokens [B, ...] so far (in a cached
            block: those before it, then the block, right-aligned), to watch the text appear.

    ValueError for prompts or settings that the model or the rule cannot take.
    """
    traits = model.traits
    if isinstance(rule, str) and rule not in RULES:
        raise unknown_name(rule, RULES, "decoding rule")
    if rule is None:
        rule = _OF_FAMILY.get(model.family.name, "dllm")
        rule = "mdlm" if rule == "bd3lm" and traits.attention != "block" else rule
    rule = dataclasses.replace(RULES[rule] if isinstance(rule, str) else rule, **changes)
    mask_id = traits.mask_id if mask_id is None else mask_id
    eos_id = traits.eos_id if eos_id is None else eos_id
    pad_id = traits.pad_id if pad_id is None else pad_id
    check_rule(model, rule, mask_id, max_new_tokens, trace)
    if rule.block_size is None:
        rule = dataclasses.replace(rule, block_size=traits.block_size or max_new_tokens)
    fillers = (pad_id, eos_id, 0) if rule.cached else (eos_id, pad_id, 0)
    filler = next(token for token in fillers if token is not None)
    rows = [np.asarray(prompt, np.int32).reshape(-1) for prompt in prompts]
    canvas, visible, prefix, result = lay_out(
        rows, max_new_tokens, rule, mask_id, filler, pad_multiple
    )
    if traits.shift and min(map(len, rows)) == 0:
        raise ValueError(
            f"a {model.family.name} model reads token i at position i - 1: begin an empty prompt "
            f"with the BOS token (bos_id of the config: {traits.bos_id})"
        )
    tokens, canvases = _decode(
        model.params,
        jax.random.key(0) if key is None else key,
        canvas,
        None if visible.all() else visible.astype(np.int32),
        module=model.model,
        network=model.family.logits,
        traits=traits,
        rule=rule,
        mask_id=mask_id,
        num_blocks=_up(max_new_tokens, rule.block_size) // rule.block_size,
        prefix=prefix,
        stop_id=eos_id if stop else None,
        trace=trace,
        show=show and (show, len(jax.tree.leaves(model.params)[0].devices()) == 1),
    )
    if canvases is not None:
        canvases = canvases[:, :, result]
    return Generated(tokens[:, result], (canvas == mask_id)[:, result], canvases)


def lay_out(
    prompts: Sequence[np.ndarray],
    new_tokens: int,
    rule: Rule,
    mask_id: int,
    filler: int,
    multiple: int = 1,
) -> tuple[np.ndarray, np.ndarray, int, slice]:
    """A canvas [B, L] of prompts and masks, and which of it is not padding.

    Also the number of leading columns that are given, and the columns of the result: the others
    fill the last cached block, or the rows up to a ``multiple``. ValueError if there is no prompt,
    or one with a mask token.
    """
    if not prompts:
        raise ValueError("generate needs at least one prompt (an empty one is a row of its own)")
    for i, prompt in enumerate(prompts):
        if np.any(prompt == mask_id):
            raise ValueError(
                f"prompt {i} holds the mask token {mask_id}, which marks tokens to generate; to "
                "fill gaps, pass a canvas to mdm_jax.samplers"
            )
    sizes = [len(prompt) for prompt in prompts]
    size = rule.block_size if rule.cached else 1
    unit = math.lcm(size, multiple)
    if rule.padding == "left":
        prefix = _up(max(sizes), unit)
        starts, ends = [prefix - n for n in sizes], [prefix + new_tokens] * len(sizes)
        result = slice(prefix - _up(max(sizes), size), ends[0])
        length = _up(ends[0], size)
    else:
        starts, ends = [0] * len(sizes), [_up(n + new_tokens, size) for n in sizes]
        prefix, result, length = (
            min(sizes) // size * size,
            slice(0, max(ends)),
            _up(max(ends), unit),
        )
    canvas = np.full((len(sizes), length), filler, np.int32)
    visible = np.zeros(canvas.shape, bool)
    for i, (start, end, prompt) in enumerate(zip(starts, ends, prompts, strict=True)):
        canvas[i, start : start + len(prompt)] = prompt
        canvas[i, start + len(prompt) : end] = mask_id
        visible[i, start:end] = True
    return canvas, visible, prefix, result


def _up(length: int, size: int) -> int:
    return -(-length // size) * size


def _counts(rule: Rule, steps: int) -> tuple[int, Callable[[Array, Array, Array], Array]]:
    """Steps of a block, and its ``count`` for ``samplers.by_score.in_blocks``."""
    if rule.schedule == "dllm":
        table = dllm_counts(np.arange(rule.block_size + 1), steps)
        table = table[:, table.any(axis=0)].astype(np.int32)

        def tabled(total: Array, left: Array, step: Array) -> Array:
            del left
            return jnp.asarray(table)[total, step]

        return table.shape[1], tabled
    if rule.schedule == "dream":
        shares = dream_shares(steps, rule.smallest_time)

        def shared(total: Array, left: Array, step: Array) -> Array:
            mean = jnp.sum(left) / jnp.float32(left.shape[0])
            count = jnp.floor(mean * jnp.asarray(shares)[step])
            return jnp.broadcast_to(count.astype(total.dtype), total.shape)

        return steps, shared

    def even(total: Array, left: Array, step: Array) -> Array:
        del left
        of = jnp.full_like(total, rule.block_size) if rule.schedule == "sdar" else total
        return kept_count(of, step, steps)

    return steps, even


# --- rules as samplers ------------------------------------------------------------------------


def make_sampler(rule: Rule, num_blocks: int) -> tuple[Sampler, np.ndarray | None]:
    """The sampler of a rule with a ``block_size``, and its grid of noise levels, if it has one."""
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
        steps, count = _counts(rule, steps)
        sampler = in_blocks(
            f"{rule.schedule} {rule.score}",
            rule.block_size,
            steps,
            functools.partial(_preference, rule, distribution if rule.filtered else None),
            drawn_from,
            count=count,
            best=functools.partial(_best, rule.threshold),
            excludes_mask=rule.excludes_mask,
        )
        sampler = sampler._replace(num_steps=lambda _: steps * (1 if rule.cached else num_blocks))
    if rule.guidance:
        sampler = samplers.wrapped(sampler, samplers.prompt_guidance(rule.guidance + 1))
    return sampler, grid


def _preference(
    rule: Rule,
    distribution: filters.LogitFilter | None,
    context: StepContext,
    logits: Array,
    drawn: Array,
) -> Array:
    keys, shape = row_streams(context.keys, "order"), drawn.shape[1:]
    logits = logits if distribution is None else distribution(logits)
    if rule.score == "random":
        return jax.vmap(lambda key: open_uniform(key, shape))(keys)
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
        noise = jax.vmap(lambda key: jax.random.gumbel(key, shape, mode="high"))(keys)
        score = score / rule.order_temperature + noise
    return score


def _best(threshold: float | None, score: Array, candidates: Array, count: Array) -> Array:
    best = best_positions(score, candidates, count)
    if threshold is None:
        return best
    above = candidates & (score > threshold)
    return jnp.where((jnp.sum(above, axis=-1) >= count)[:, None], above, best)


@functools.partial(
    jax.jit,
    static_argnames=(
        *("module", "network", "traits", "rule", "mask_id", "num_blocks"),
        *("prefix", "stop_id", "trace", "show"),
    ),
)
def _decode(
    params: PyTree,
    key: Array,
    canvas: Array,
    documents: Array | None,
    *,
    module: Any,
    network: Callable[..., Array],
    traits: Traits,
    rule: Rule,
    mask_id: int,
    num_blocks: int,
    prefix: int,
    stop_id: int | None,
    trace: bool,
    show: tuple[Show, bool] | None,
) -> tuple[Array, Array | None]:
    sampler, grid = make_sampler(rule, 1 if rule.cached else num_blocks)
    if show is not None:
        sampler = _shown(sampler, *show)
    options = {"mask_id": mask_id, "documents": documents}
    if rule.cached:
        decoder = cached_block_decoder(module, rule.block_size)
        options |= {"prefix": prefix, "stop_id": stop_id}
        return samplers.sample_blocks(key, decoder, params, sampler, grid, canvas, **options), None
    moved = rule.padding == "left" and "positions" in inspect.signature(network).parameters

    def model_fn(tokens: Array, logsnr: Array, visible: Array | None) -> Array:
        inputs = {}
        if moved and visible is not None:
            positions = jnp.cumsum(visible, axis=-1) - 1
            inputs["positions"] = jnp.where(visible > 0, positions, 1)
        if traits.time_conditioning:  # the loops by counts know no level
            level = logsnr[:, 0] if grid is not None else jnp.full(len(tokens), jnp.inf)
            inputs["timesteps"] = jax.nn.softplus(-level)
        logits = network(module, params, traits, tokens, visible, **inputs)
        return shifted(logits) if traits.shift else logits

    def canvases(state: samplers.SamplerState) -> Array | None:
        return state.tokens if trace else None

    return samplers.sample_with_trace(key, model_fn, sampler, grid, canvas, canvases, **options)


def shifted(logits: Array) -> Array:
    """[N, L, K] logits of the token at their own position, from those of the next one (Dream)."""
    return jnp.concatenate([logits[:, :1], logits[:, :-1]], axis=1)


def _shown(sampler: Sampler, show: Show, ordered: bool) -> Sampler:
    def on_host(*parts: Array) -> None:
        show(np.concatenate([np.asarray(part) for part in parts], axis=1))

    def step(context, denoise, state):
        state = sampler.step(context, denoise, state)
        before = () if context.before is None else (context.before,)
        jax.debug.callback(on_host, *before, state.tokens, ordered=ordered)
        return state

    return sampler._replace(step=step)


def check_rule(
    model: HubModel, rule: Rule, mask_id: int | None, new_tokens: int, trace: bool
) -> None:
    traits, name = model.traits, model.family.name
    if new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {new_tokens}")
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
    if rule.schedule == "dream" and rule.block_size not in (None, new_tokens):
        raise ValueError("the schedule 'dream' fills all tokens together: leave block_size out")


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
