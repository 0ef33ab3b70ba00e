"""Decoding as the families' own loops do it: one generator, the rules of the loops as data.

The loops differ in how many tokens a pass fills (schedule), which (score), where the padding of a
batch is, and whether finished blocks are cached; a ``rules.Rule`` says so. They run as samplers
(``samplers.by_score.in_blocks``, ``samplers.sample_blocks``): one compiled program, no step on the
host. With temperature 0 and in float32, tokens are those of the originals, one by one. With a
temperature the law is the same, the random numbers are not.

Where an original overwrites tokens that were given, this does not: SDAR's loop does if a step's
quota exceeds the masks left in its block, Dream's if rows of a batch have different numbers of
masks.
"""

import collections
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax import distributed, samplers
from mdm_jax.hub.family import Traits
from mdm_jax.hub.model import HubModel
from mdm_jax.hub.rules import INFILLING, OF_FAMILY, Rule, check_rule, find_rule, make_sampler
from mdm_jax.models.cross_entropy import Readout, without_tokens
from mdm_jax.models.decoders import cached_block_decoder, partial_decoder
from mdm_jax.samplers import Sampler, Show
from mdm_jax.samplers.blocks import sample_blocks_with_passes
from mdm_jax.types import Array, ArrayLike, PyTree


class Generated(NamedTuple):
    """Tokens [B, L] int32 with prompts and padding; ``written`` [B, L] bool, those generated.

    ``canvases`` [S, B, L]: tokens after every step, if asked for. ``passes`` [B] int32: forward
    passes of each row, those that only read finished blocks included; a guided one counts once.
    """

    tokens: Array
    written: np.ndarray
    canvases: Array | None
    passes: Array


def generate(
    model: HubModel,
    prompts: Sequence[ArrayLike],
    max_new_tokens: int = 128,
    *,
    rule: Rule | str | None = None,
    key: Array | None = None,
    row_offset: ArrayLike = 0,
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
        row_offset: as in ``samplers.sample``.
        mask_id, eos_id, pad_id: where config.json does not say (A2D and LLaDA-MoE keep them in the
            tokenizer).
        stop: rules with a cache: after a block with which every row has an EOS, the rest is EOS.
        pad_multiple: rows are filled up to a multiple of this length, so that prompts of many
            lengths run in few programs; the padding is not returned.
        trace: return the tokens after every step (not with a cache).
        show: called on the host after every step with the tokens [B, L] so far, to watch the text
            appear (``samplers.shown``).

    ValueError for prompts or settings that the model or the rule cannot take.
    """
    rule, ids = settle(
        model, prompts, max_new_tokens, rule, changes, mask_id, eos_id, pad_id, trace
    )
    rows = _rows(prompts)
    canvas, visible, prefix, result = lay_out(
        rows, max_new_tokens, rule, ids.mask, ids.filler(rule), pad_multiple
    )
    blocks = {"num_blocks": _up(max_new_tokens, rule.block_size) // rule.block_size}
    blocks |= {"prefix": prefix if rule.cached else 0, "stop_id": ids.eos if stop else None}
    blocks["row_offset"] = row_offset
    return _written(model, rule, ids.mask, key, canvas, visible, result, trace, show, **blocks)


def generate_stream(
    model: HubModel,
    prompts: Sequence[ArrayLike],
    max_new_tokens: int = 128,
    *,
    batch_size: int = 8,
    rule: Rule | str | None = None,
    key: Array | None = None,
    mask_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
    stop: bool = True,
    pad_multiple: int = 64,
    key_numbers: Sequence[int] | None = None,
    **changes: Any,
) -> Iterator[samplers.FinishedRow]:
    """The number, new tokens [max_new_tokens] and steps of each prompt, as soon as it is finished.

    ``batch_size`` rows run at a time; where one is finished the next prompt takes its place
    (``samplers.make_stream``). What a prompt gets depends neither on the others nor on the batch:
    its noise is keyed by its number, or by its of the ``key_numbers``. Prompts are grouped by
    length, rounded up to a multiple of ``pad_multiple``, and each group's rows run in one program.
    On one device.

    Arguments as of :func:`generate`, but with ``stop`` a row ends at an EOS before which everything
    is filled, and the rest is EOS. ValueError as there, and for rules with an exact cache or along
    noise levels (the schedule "ancestral"), whose rows go in step.
    """
    rule, ids = settle(model, prompts, max_new_tokens, rule, changes, mask_id, eos_id, pad_id)
    if rule.cached or rule.schedule == "ancestral":
        raise ValueError(
            "rows of a stream begin at different times: it needs a rule with cached=False that "
            f"counts tokens, got cached={rule.cached}, schedule={rule.schedule}; use hub.generate"
        )
    stream = _stream_program(
        model.model,
        model.family.outputs,
        model.traits,
        rule,
        _up(max_new_tokens, rule.block_size) // rule.block_size,
        ids.eos if stop else None,
        mask_id=ids.mask,
        batch_size=batch_size,
    )
    rows = _rows(prompts)
    reach = 0 if rule.padding == "left" else max_new_tokens
    groups: dict[int, list[int]] = collections.defaultdict(list)
    for number, row in enumerate(rows):
        groups[_up(max(len(row), 1) + reach, pad_multiple)].append(number)

    def laid_out(numbers: list[int]) -> Iterator[samplers.Row]:
        for number in numbers:
            canvas, visible, *_ = lay_out(
                [rows[number]], max_new_tokens, rule, ids.mask, ids.filler(rule), pad_multiple
            )
            own = None if key_numbers is None else key_numbers[number]
            yield samplers.Row(number, canvas[0], visible[0].astype(np.int32), own)

    def run() -> Iterator[samplers.FinishedRow]:
        for _, numbers in sorted(groups.items()):
            first = jax.random.key(0) if key is None else key
            for done in stream(model.params, first, laid_out(numbers)):
                begin = len(rows[done.number]) if reach else len(done.tokens) - max_new_tokens
                yield done._replace(tokens=done.tokens[begin : begin + max_new_tokens])

    return run()


def infill(
    model: HubModel,
    canvases: Sequence[ArrayLike],
    *,
    rule: Rule | str | None = None,
    key: Array | None = None,
    mask_id: int | None = None,
    eos_id: int | None = None,
    trace: bool = False,
    show: Show | None = None,
    **changes: Any,
) -> Generated:
    """Fill the mask tokens of rows, wherever they stand; given tokens never change.

    Compiled once per rule and shape. Arguments as of :func:`generate`, but ``canvases``: token ids
    of each row, the mask token where one is to be written. A block is ``block_size`` columns, whose
    masks are filled together (dllm's ``infill``); None: the whole row. ``steps`` is divided among
    the blocks. ``rule`` is dllm's where none is given, ancestral for MDLM.

    ValueError as :func:`generate`, and for block models and rules with a cache, which never see
    what comes later.
    """
    rule, ids = _settled(model, rule, changes, INFILLING, mask_id, eos_id, None)
    if rule.cached or model.traits.attention == "block":
        raise ValueError(
            "infilling needs a model and a rule by which tokens see later ones: "
            f"{model.family.name} has {model.traits.attention} attention, the rule "
            f"cached={rule.cached}"
        )
    check_rule(model, rule, ids.mask, trace)
    if rule.block_size is not None and (rule.padding == "left" or rule.schedule == "dream"):
        raise ValueError(
            "block_size counts columns, so it needs padding='right', and not the schedule 'dream', "
            "which fills all tokens together; leave it out"
        )
    rows = _rows(canvases)
    lengths = np.array([len(row) for row in rows])[:, None]
    columns = np.arange(lengths.max(initial=1))[None]
    visible = columns < lengths if rule.padding == "right" else columns >= columns.size - lengths
    canvas = np.full(visible.shape, ids.filler(rule), np.int32)
    canvas[visible] = np.concatenate(rows)
    rule = dataclasses.replace(rule, block_size=rule.block_size or columns.size)
    blocks = {"num_blocks": _up(columns.size, rule.block_size) // rule.block_size}
    blocks |= {"prefix": 0, "stop_id": None, "in_columns": True}
    result = slice(None)
    return _written(model, rule, ids.mask, key, canvas, visible, result, trace, show, **blocks)


class Ids(NamedTuple):
    """Token ids of a decoding."""

    mask: int | None
    eos: int | None
    pad: int | None

    def filler(self, rule: Rule) -> int:
        """The token of padding."""
        fillers = (self.pad, self.eos, 0) if rule.cached else (self.eos, self.pad, 0)
        return next(token for token in fillers if token is not None)


def _settled(
    model: HubModel,
    rule: Rule | str | None,
    changes: Mapping[str, Any],
    of_family: Mapping[str, str],
    *ids: int | None,
) -> tuple[Rule, Ids]:
    """The rule that is meant, with its changes, and the token ids, given or the model's."""
    traits, name = model.traits, model.family.name
    rule = dataclasses.replace(find_rule(name, traits, rule, of_family), **changes)
    if name == "bd3lm" and rule.cached and rule.window is None:  # the size of its cache
        size = rule.block_size or traits.block_size
        rule = dataclasses.replace(rule, window=max(traits.length // size, 1) * size)
    own = (traits.mask_id, traits.eos_id, traits.pad_id)
    return rule, Ids(*(a if b is None else b for a, b in zip(own, ids, strict=True)))


def settle(
    model: HubModel,
    prompts: Sequence[ArrayLike],
    max_new_tokens: int,
    rule: Rule | str | None,
    changes: Mapping[str, Any],
    mask_id: int | None,
    eos_id: int | None,
    pad_id: int | None,
    trace: bool = False,
) -> tuple[Rule, Ids]:
    """The checked rule, with a block size, and the token ids of :func:`generate`."""
    traits = model.traits
    rule, ids = _settled(model, rule, changes, OF_FAMILY, mask_id, eos_id, pad_id)
    check_rule(model, rule, ids.mask, trace)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if rule.schedule == "dream" and rule.block_size not in (None, max_new_tokens):
        raise ValueError("the schedule 'dream' fills all tokens together: leave block_size out")
    if traits.shift and min(map(len, _rows(prompts))) == 0:
        raise ValueError(
            f"a {model.family.name} model reads token i at position i - 1: begin an empty prompt "
            f"with the BOS token (bos_id of the config: {traits.bos_id})"
        )
    if rule.block_size is None:
        rule = dataclasses.replace(rule, block_size=traits.block_size or max_new_tokens)
    return rule, ids


def _rows(rows: Sequence[ArrayLike]) -> list[np.ndarray]:
    rows = [np.asarray(row, np.int32).reshape(-1) for row in rows]
    if not rows:
        raise ValueError("decoding needs at least one prompt (an empty one is a row of its own)")
    return rows


def _written(
    model: HubModel,
    rule: Rule,
    mask_id: int,
    key: Array | None,
    canvas: np.ndarray,
    visible: np.ndarray,
    result: slice,
    trace: bool,
    show: Show | None,
    **blocks: Any,
) -> Generated:
    given = (canvas, None if visible.all() else visible.astype(np.int32))
    tokens, canvases, passes = _decode(
        model.params,
        jax.random.key(0) if key is None else key,
        *distributed.spread_rows(given, model.params),
        module=model.model,
        network=model.family.outputs,
        traits=model.traits,
        rule=rule,
        mask_id=mask_id,
        trace=trace,
        show=show and (show, len(jax.tree.leaves(model.params)[0].devices()) == 1),
        **blocks,
    )
    if canvases is not None:
        canvases = canvases[:, :, result]
    return Generated(tokens[:, result], (canvas == mask_id)[:, result], canvases, passes)


def lay_out(
    prompts: Sequence[np.ndarray],
    new_tokens: int,
    rule: Rule,
    mask_id: int,
    filler: int,
    multiple: int = 1,
) -> tuple[np.ndarray, np.ndarray, int, slice]:
    """A canvas [B, L] of prompts and masks, and which of it is not padding.

    Also a number of leading columns that are given, and the columns of the result: the others fill
    the last cached block, or the rows up to a ``multiple``. That number is a multiple too, so that
    it does not grow, and compile, with every block. ValueError for a prompt with a mask token.
    """
    for i, prompt in enumerate(prompts):
        if np.any(prompt == mask_id):
            raise ValueError(
                f"prompt {i} holds the mask token {mask_id}, which marks tokens to generate; to "
                "fill gaps use hub.infill"
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
            min(sizes) // unit * unit,
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


@functools.partial(
    jax.jit,
    static_argnames=(
        *("module", "network", "traits", "rule", "mask_id", "num_blocks"),
        *("prefix", "stop_id", "in_columns", "trace", "show"),
    ),
)
def _decode(
    params: PyTree,
    key: Array,
    canvas: Array,
    documents: Array | None,
    *,
    module: Any,
    network: Callable[..., Readout | Array],
    traits: Traits,
    rule: Rule,
    mask_id: int,
    num_blocks: int,
    prefix: int,
    stop_id: int | None,
    trace: bool,
    show: tuple[Show, bool] | None,
    in_columns: bool = False,
    row_offset: ArrayLike = 0,
) -> tuple[Array, Array | None, Array]:
    sampler, grid = make_sampler(rule, 1 if rule.cached else num_blocks, in_columns)
    if show is not None:
        sampler = samplers.shown(sampler, *show)
    options = {"mask_id": mask_id, "documents": documents, "row_offset": row_offset}
    if rule.cached:
        window = rule.window and rule.window // rule.block_size
        decoder = cached_block_decoder(module, rule.block_size, window)
        decoder = decoder._replace(logits=without_tokens(decoder.logits, rule.suppress_tokens))
        options |= {"prefix": prefix, "stop_id": stop_id, "stop_entropy": rule.stop_entropy}
        tokens, passes = sample_blocks_with_passes(
            key, decoder, params, sampler, grid, canvas, **options
        )
        return tokens, None, passes
    apply_fn, over = _uncached(module, network, traits, rule, grid is not None)
    sampler = samplers.counted(over(sampler, params, documents))

    def traced(state: samplers.SamplerState) -> tuple[Array | None, Array]:
        return state.tokens if trace else None, state.memory[1]

    model_fn = functools.partial(apply_fn, params)
    tokens, (canvases, passes) = samplers.sample_with_trace(
        key, model_fn, sampler, grid, canvas, traced, **options
    )
    return tokens, canvases, passes[-1]


def _uncached(
    module: Any, network: Callable[..., Readout | Array], traits: Traits, rule: Rule, levels: bool
) -> tuple[Callable[..., Readout | Array], Callable[..., Sampler]]:
    """The ``apply_fn`` of a rule without an exact cache, and what puts its sampler over another.

    ``levels``: the sampler goes along a grid of noise levels; the loops by counts know none.
    """
    moved = rule.padding == "left" and "positions" in inspect.signature(network).parameters

    def places(visible: Array) -> Array:
        return jnp.where(visible > 0, jnp.cumsum(visible, axis=-1) - 1, 1)

    def apply_fn(
        params: PyTree, tokens: Array, logsnr: Array, visible: Array | None
    ) -> Readout | Array:
        inputs = {}
        if moved and visible is not None:
            inputs["positions"] = places(visible)
        if traits.time_conditioning:
            level = logsnr[:, 0] if levels else jnp.full(len(tokens), jnp.inf)
            inputs["timesteps"] = jax.nn.softplus(-level)
        outputs = network(module, params, traits, tokens, visible, **inputs)
        return shifted(outputs) if traits.shift else outputs

    def over(
        sampler: Sampler, params: PyTree, documents: Array | None, rows_per_pass: int | None = None
    ) -> Sampler:
        if not rule.approximation:
            return sampler
        decoder = partial_decoder(module, shift=traits.shift, positions=places if moved else None)
        decoder = decoder._replace(readout=without_tokens(decoder.readout, rule.suppress_tokens))
        return samplers.approximately_cached(
            sampler,
            samplers.ApproximateCache(rule.approximation, rule.refresh),
            decoder,
            params,
            documents,
            rows_per_pass=rows_per_pass,
            level=None if levels else lambda *_: jnp.inf,
        )

    return without_tokens(apply_fn, rule.suppress_tokens), over


@functools.lru_cache(maxsize=64)
def _stream_program(
    module: Any,
    network: Callable[..., Readout | Array],
    traits: Traits,
    rule: Rule,
    num_blocks: int,
    stop_id: int | None,
    **options: Any,
) -> Callable[..., Iterator[samplers.FinishedRow]]:
    sampler, grid = make_sampler(rule, num_blocks, alone=True)
    sampler = sampler if stop_id is None else samplers.stopping_at(sampler, stop_id)
    apply_fn, over = _uncached(module, network, traits, rule, grid is not None)
    over = functools.partial(over, rows_per_pass=1)
    return samplers.make_stream(apply_fn, sampler, over=over, **options)


def shifted(outputs: Readout | Array) -> Readout | Array:
    """Outputs [N, L, ...] for the token at their own position, from those for the next (Dream)."""
    if isinstance(outputs, Readout):
        return dataclasses.replace(outputs, features=shifted(outputs.features))
    return jnp.concatenate([outputs[:, :1], outputs[:, :-1]], axis=1)
