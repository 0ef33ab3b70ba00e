"""Composition of variance transforms, in reading order."""

import itertools

from mdm_jax.bias import BIAS_LABELS, worst_bias
from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.streams import stream
from mdm_jax.typing import Array, PyTree
from mdm_jax.variance.transform import (
    LevelProfile,
    Phase,
    ProfileFn,
    VarianceTransform,
    flat_profile,
    stateless,
)


def chain(*transforms: VarianceTransform) -> VarianceTransform:
    """Composes transforms: couple, then warp, then replicate.

    The result is itself a transform; a chain inside a chain is spliced in. States are kept in a
    dict by member name, and each member draws from its own named stream, so that adding one leaves
    the random numbers of the others unchanged.

    Keeps: what every member keeps. Couples: what any member couples.
    Costs: the product of the members' views. Bias: the worst label of its members. Its level
    profile is that of its warp, and flat if it holds none.

    Raises:
        ValueError: if a name occurs twice, if a member stands after one of a later phase, or if two
            members draw the same part anew (the second would discard the first), if a member that
            draws levels anew follows one that made several views, or if there are two warps. The
            message names the two that clash.
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

    views = 1
    for t in members:
        views *= t.views
    return VarianceTransform(
        name=f"chain({', '.join(t.name for t in members)})",
        phase=members[-1].phase,
        init=init,
        draw=draw,
        update=update,
        bias=worst_bias(*(t.bias for t in members)),
        views=views,
        replaces=frozenset().union(*(t.replaces for t in members)),
        members=members,
        profile=_profile(members),
    )


def identity() -> VarianceTransform:
    """Leaves the draw alone: independent levels and masks, the baseline.

    Keeps: everything. Couples: nothing. Costs: nothing, one view. Bias: exact.
    """
    return stateless("identity", Phase.COUPLE, lambda _key, current, _spec: current)


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
        return lambda _state, u: flat_profile(u)
    (warp,) = warps
    if warp.profile is None:
        return None

    def profile(state: dict[str, PyTree], u: Array) -> LevelProfile:
        return warp.profile(state[warp.name], u)

    return profile


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
        lost = first.replaces & second.replaces
        if lost:
            raise ValueError(
                f"chain: {second.name!r} draws {', '.join(sorted(lost))} anew and would discard "
                f"{first.name!r}; keep one of the two"
            )
