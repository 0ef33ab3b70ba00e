"""Variance transforms as triples ``(init, draw, update)``, and their composition by ``chain``.
A :class:`~mdm_jax.draws.Draw` passes through a chain as gradients pass through an optax chain.
Transforms couple rows, warp quantiles (compensated in ``log_weight``) or replicate views. No noise
level, model or loss is available while drawing, so they cannot change the objective.
"""

import enum
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mdm_jax.draws import Draw, DrawSpec, LossStats, iid
from mdm_jax.rng import stream
from mdm_jax.types import BIAS_LABELS, Array, PyTree, worst_bias


class LevelProfile(NamedTuple):
    """Log density of the levels drawn, -inf where none are, and log weight, at given quantiles.
    Their sum is the log factor on the effective weighting: 0 if exact, level-dependent if biased.
    """

    log_density: Array
    log_weight: Array


InitFn = Callable[[DrawSpec], PyTree]
DrawFn = Callable[[Array, PyTree, Draw, DrawSpec], Draw]
UpdateFn = Callable[[PyTree, Draw, LossStats], PyTree]
ProfileFn = Callable[[PyTree, Array], LevelProfile]


class Phase(enum.IntEnum):
    """Order in a chain; phases never decrease, as couplings discard warped levels, not weights."""

    COUPLE = 0
    WARP = 1
    REPLICATE = 2


class EmptyState(NamedTuple):
    """State of a transform that learns nothing."""


class VarianceTransform(NamedTuple):
    """A variance-reduction method as pure functions.

    Attributes:
        name: key of its state and of its random stream; unique within a chain.
        init: ``init(spec) -> state``; structure, shapes and dtypes are fixed from then on.
        draw: ``draw(key, state, draw, spec) -> draw``, from named streams of the key; reads state.
        update: ``update(state, draw, stats) -> state`` after the step, from raw losses.
        bias: one of :data:`mdm_jax.types.BIAS_LABELS`; a chain has the worst of its members.
        views: factor on the number of views, hence on forward passes per row.
        replaces: names of the Draw fields that are drawn anew, discarding earlier values.
        members: the parts of a chain.
        profile: ``profile(state, u [..., S]) -> LevelProfile``; None if flat (no warp) or unknown.
    """

    name: str
    phase: Phase
    init: InitFn
    draw: DrawFn
    update: UpdateFn
    bias: str = "exact"
    views: int = 1
    replaces: frozenset[str] = frozenset()
    members: tuple["VarianceTransform", ...] = ()
    profile: ProfileFn | None = None


def stateless(
    name: str,
    phase: Phase,
    draw: Callable[[Array, Draw, DrawSpec], Draw],
    *,
    views: int = 1,
    replaces: frozenset[str] = frozenset(),
    bias: str = "exact",
    profile: Callable[[Array], LevelProfile] | None = None,
) -> VarianceTransform:
    """A transform without state, from ``draw(key, draw, spec) -> draw`` and ``profile(u)``."""
    return VarianceTransform(
        name=name,
        phase=phase,
        init=lambda _: EmptyState(),
        draw=lambda key, _, current, spec: draw(key, current, spec),
        update=lambda state, _draw, _stats: state,
        bias=bias,
        views=views,
        replaces=replaces,
        profile=None if profile is None else lambda _, u: profile(u),
    )


def draw_batch(key: Array, transform: VarianceTransform, state: PyTree, spec: DrawSpec) -> Draw:
    """The draw of one step for the *global* batch of ``spec``; shards and microbatches slice it."""
    return transform.draw(key, state, iid(key, spec), spec)


def replicate_views(draw: Draw, noises: list[Array]) -> Draw:
    """``draw`` once per entry of ``noises`` ([V, B, ...] each), levels shared, views stacked."""
    copies = [draw._replace(noise=noise) for noise in noises]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=0), *copies)


def identity() -> VarianceTransform:
    """Independent levels and masks, the baseline.
    Keeps: everything. Couples: nothing. Costs: one view. Bias: exact.
    """
    return stateless("identity", Phase.COUPLE, lambda _key, current, _spec: current)


def chain(*transforms: VarianceTransform) -> VarianceTransform:
    """Composes transforms in reading order: couple, then warp, then replicate.

    Nested chains are flattened. States are a dict by member name; each member has its own named
    random stream, so adding one leaves the others' numbers unchanged. The level profile is the
    warp's, or flat.
    Keeps: what every member keeps. Couples: what any member couples. Costs: the product of the
    members' views. Bias: the worst label of its members. Raises: TypeError for other arguments;
    ValueError if a name occurs twice, phases decrease, there are two warps, two members draw the
    same field anew, or a member draws levels anew after one that made several views.
    """
    members = tuple(itertools.chain.from_iterable(_members(t) for t in transforms)) or (identity(),)
    _check(members)

    def init(spec: DrawSpec) -> dict[str, PyTree]:
        return {t.name: t.init(spec) for t in members}

    def draw(key: Array, state: dict[str, PyTree], current: Draw, spec: DrawSpec) -> Draw:
        for t in members:
            current = t.draw(stream(key, t.name), state[t.name], current, spec)
        return current

    def update(state: dict[str, PyTree], current: Draw, stats: LossStats) -> dict[str, PyTree]:
        return {t.name: t.update(state[t.name], current, stats) for t in members}

    return VarianceTransform(
        name=f"chain({', '.join(t.name for t in members)})",
        phase=members[-1].phase,
        init=init,
        draw=draw,
        update=update,
        bias=worst_bias(*(t.bias for t in members)),
        views=math.prod(t.views for t in members),
        replaces=frozenset().union(*(t.replaces for t in members)),
        members=members,
        profile=_profile(members),
    )


def _members(transform: VarianceTransform) -> tuple[VarianceTransform, ...]:
    if not isinstance(transform, VarianceTransform):
        hint = f"; did you mean {transform.__name__}()?" if hasattr(transform, "__name__") else ""
        raise TypeError(
            f"chain takes variance transforms such as mirror(), got {transform!r}{hint}"
        )
    return transform.members or (transform,)


def _profile(members: tuple[VarianceTransform, ...]) -> ProfileFn | None:
    warps = [t for t in members if t.phase == Phase.WARP]
    if not warps:
        return lambda _state, u: LevelProfile(jnp.zeros_like(u), jnp.zeros_like(u))
    (warp,) = warps
    if warp.profile is None:
        return None
    return lambda state, u: warp.profile(state[warp.name], u)


def _check(members: tuple[VarianceTransform, ...]) -> None:
    for t in members:
        if t.bias not in BIAS_LABELS:
            raise ValueError(f"{t.name}: bias must be one of {BIAS_LABELS}, got {t.bias!r}")
    for first, second in itertools.combinations(members, 2):
        if first.name == second.name:
            raise ValueError(
                f"chain: the name {first.name!r} occurs twice; states and random streams go by "
                "name, so give one of the two another name"
            )
        if first.phase > second.phase:
            raise ValueError(
                f"chain: {second.name!r} ({second.phase.name.lower()}) cannot follow "
                f"{first.name!r} ({first.phase.name.lower()}); the order is couple, warp, replicate"
            )
        if first.phase == second.phase == Phase.WARP:
            raise ValueError(
                f"chain: {second.name!r} would bend the density of {first.name!r}, whose range and "
                "bins would no longer be where it says; a chain holds one warp, so mix the two "
                "densities into one"
            )
        if "u" in second.replaces and first.views > 1:
            raise ValueError(
                f"chain: {second.name!r} draws u anew and would discard the {first.views} views of "
                f"{first.name!r}; put {second.name!r} first"
            )
        if lost := first.replaces & second.replaces:
            raise ValueError(
                f"chain: {second.name!r} draws {', '.join(sorted(lost))} anew and would discard "
                f"{first.name!r}; keep one of the two"
            )
