"""The triple (init, draw, update) that every variance-reduction method is.

optax composes because what flows through a chain, the gradients, has the same structure going in
and coming out. Here a :class:`~mdm_jax.draws.Draw` flows. A transform couples its rows, warps its
quantiles (and pays for it in ``log_weight``) or replicates its views. It never sees a noise level,
a model or a loss while it draws, so it cannot change the objective.
"""

import enum
from collections.abc import Callable
from typing import NamedTuple

import jax

from mdm_jax.draws import Draw, DrawSpec, LossStats, iid
from mdm_jax.typing import Array, PyTree


class LevelProfile(NamedTuple):
    """What a transform does to the levels, at given quantiles.

    Attributes:
        log_density: log of the density it draws them from, nats; -inf where it draws none.
        log_weight: log of the factor it puts on their losses.

    The sum is the log of the factor on the effective weighting: zero everywhere for an exact
    transform, -inf where a truncated one draws nothing, and a function for a biased one.
    """

    log_density: Array
    log_weight: Array


InitFn = Callable[[DrawSpec], PyTree]
DrawFn = Callable[[Array, PyTree, Draw, DrawSpec], Draw]
UpdateFn = Callable[[PyTree, Draw, LossStats], PyTree]
ProfileFn = Callable[[PyTree, Array], LevelProfile]


class Phase(enum.IntEnum):
    """Where in a chain a transform may stand; phases never decrease along a chain.

    A coupling ties quantiles together, of rows or of views, and leaves each uniform; after a warp
    it would discard the warp and keep its weight. A warp moves quantiles and pays for it; a chain
    holds at most one. A replication copies whatever stands before it into further views.
    """

    COUPLE = 0
    WARP = 1
    REPLICATE = 2


class EmptyState(NamedTuple):
    """State of a transform in which nothing moves."""


class VarianceTransform(NamedTuple):
    """A variance-reduction method as pure functions.

    Attributes:
        name: key of its state and of its random stream; unique within a chain.
        phase: see :class:`Phase`.
        init: ``init(spec) -> state``. The structure, shapes and dtypes never change afterwards.
        draw: ``draw(key, state, draw, spec) -> draw``. Draws from named streams of the key, never
            from the key itself. Reads the state and cannot write it, so a
            batch can be redrawn any number of times without disturbing training.
        update: ``update(state, draw, stats) -> state`` after the step, from raw losses.
        bias: one of :data:`mdm_jax.bias.BIAS_LABELS`; a chain carries the worst of its members.
        views: factor on the number of views, and thereby on forward passes per row.
        replaces: names of the Draw fields that are drawn anew, whatever stood there before.
        members: the parts of a chain, empty otherwise.
        profile: ``profile(state, u) -> LevelProfile`` of the quantiles ``u`` [..., S], or None if
            not known. A transform that treats all S levels alike takes any shape; one that does
            not (:func:`~mdm_jax.variance.cdtd_warp`) gives each entry of the last axis that
            level's profile. Couplings and replications have none: they leave the density flat.
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
    """A transform without state: ``draw(key, draw, spec) -> draw`` and ``profile(u)``."""
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


def flat_profile(u: Array) -> LevelProfile:
    """The profile of uniform levels that nothing is paid for."""
    return LevelProfile(jax.numpy.zeros_like(u), jax.numpy.zeros_like(u))


def draw_batch(key: Array, transform: VarianceTransform, state: PyTree, spec: DrawSpec) -> Draw:
    """The draw of one step: independent uniforms passed through ``transform``.

    Args:
        key: typed key of the step's draw, for example
            ``streams.stream(streams.step_key(seed, step), "draw")``.
        transform: a transform or a chain.
        state: its state, read only.
        spec: shape of the *global* batch; shards and microbatches slice the result.

    Returns:
        Draw with ``transform.views`` views.
    """
    return transform.draw(key, state, iid(key, spec), spec)


def replicate_views(draw: Draw, noises: list[Array]) -> Draw:
    """``draw`` once per entry of ``noises`` ([V, B, ...] each), levels shared, views stacked."""
    copies = [draw._replace(noise=noise) for noise in noises]
    return jax.tree.map(lambda *leaves: jax.numpy.concatenate(leaves, axis=0), *copies)
