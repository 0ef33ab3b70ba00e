"""The toy's exact moments under the masks, weights and densities that the implementation makes.

Nothing is sampled. For a level and a coupling of views, the mask of one position depends on its own
noise alone, which cuts the unit interval into a few cells; the processes are run once per cell, and
the laws of whole masks are products over the positions. Integrals over the level are Gauss-Legendre
sums between the density's own edges.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from zoo import quick

from mdm_jax import corruption, objectives, schedules, testing
from mdm_jax.draws import Draw, DrawSpec
from mdm_jax.schedules import masked as schedules_masked
from mdm_jax.testing import toys
from mdm_jax.variance.densities import piecewise_density, warp
from mdm_jax.variance.transform import Phase

PROBABILITIES = np.array(toys.ROW_PROBABILITIES)
NELBO = (4.37020885, 4.52536593, 2.44006023)
MEAN = 4.03072625
BITS = (np.arange(16)[:, None] >> np.arange(4)) & 1
SIZE = BITS.sum(1)


class Moments(NamedTuple):
    """Exact decomposition of the variance of one row's estimate, views averaged."""

    mean: float
    pattern: float
    rate: float
    data: float

    @property
    def total(self):
        return self.pattern + self.rate + self.data


@functools.cache
def loss_table(rows=toys.ROWS):
    """S(x, M) of the given rows, [rows, 16], float64."""
    with jax.enable_x64(True):
        params, model = toys.toy_params(jnp.float64), toys.Toy(dtype=jnp.float64)
        batch = toys.toy_batch()
        table = []
        for tokens in rows:
            row = jax.tree.map(lambda a: a[0], batch)._replace(tokens=np.array(tokens))
            table.append(testing.mask_losses(lambda *a: model.apply(params, *a), row, toys.MASK_ID))
    return np.stack(table)


@functools.cache
def gradient_table():
    """d S(x, M) / d theta, [3, 16, 3], float64."""
    tokens = np.repeat(np.array(toys.ROWS), 16, axis=0)
    masked = np.tile(BITS.astype(bool), (3, 1))

    def losses(params):
        logits = toys.Toy(dtype=jnp.float64).apply(params, np.where(masked, toys.MASK_ID, tokens))
        nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
        return jnp.sum(jnp.where(masked, nats, 0.0), axis=-1)

    with jax.enable_x64(True):
        jacobian = quick(jax.jacrev(losses))(toys.toy_params(jnp.float64))["params"]["theta"]
    return np.asarray(jacobian).reshape(3, 16, 3)


def gauss(edges, order=4):
    """Nodes and weights between consecutive edges, flat."""
    nodes, weights = np.polynomial.legendre.leggauss(order)
    edges = np.asarray(edges, np.float64)
    widths = np.diff(edges)[:, None]
    points = edges[:-1, None] + (nodes + 1) / 2 * widths
    return points.ravel(), (weights / 2 * widths).ravel()


def level_nodes(eps, views=1, pieces=10, order=5):
    """Base quantiles and weights for rates in [eps, 1]: logarithmic pieces, cut at every j / K."""
    cuts = [np.geomspace(eps, 1, pieces + 1), np.arange(1, views) / views]
    cuts = np.unique(np.concatenate(cuts))
    rates, weights = gauss(cuts[cuts >= eps], order)
    return (1 - rates) / (1 - eps), weights / (1 - eps)


def density_nodes(density, order=2):
    """Base quantiles and weights within the cells of a piecewise density."""
    return gauss(np.asarray(density.points, np.float64) / 2**23, order)


def rate_bins(eps, bins, spacing=np.geomspace):
    """Edges over the quantile for bins of the rate in [eps, 1], the bins of the rate reversed."""
    rates = spacing(eps, 1, bins + 1)
    rates[[0, -1]] = eps, 1
    return ((1 - rates) / (1 - eps))[::-1]


def mean_over_bins(edges, eps, value, order=8):
    """Mean over each bin of the quantile of a function of the rate."""
    u, weights = gauss(edges, order)
    total = (value(1 - (1 - eps) * u) * weights).reshape(-1, order).sum(1)
    return total / np.diff(edges)


def bernoulli_law(rates):
    """P(M | m), [N, 16]."""
    rates = np.asarray(rates, np.float64)[:, None]
    return rates**SIZE * (1 - rates) ** (4 - SIZE)


def level_moments(rates, rows=toys.ROWS):
    """v, g, c and s of f = S / m at each rate."""
    values = loss_table(rows)[:, None] / np.asarray(rates)[:, None]  # [rows, N, 16]
    first = (values * bernoulli_law(rates)).sum(-1)
    second = (values**2 * bernoulli_law(rates)).sum(-1)
    g = PROBABILITIES @ first
    v = PROBABILITIES @ (second - first**2)
    return v, g, PROBABILITIES @ first**2 - g**2, PROBABILITIES @ second


def truncated_law(eps):
    """Masking rates uniform on [eps, 1]; quantile u is the rate 1 - (1 - eps) u."""
    return schedules.law_of(schedules_masked.clipped(eps, 1.0)) if eps else schedules.logistic()


class Views(NamedTuple):
    """What the implementation does at given levels.

    Attributes:
        rate: [V, N] masking rates. weight: [V, N, 16] all weights, per mask.
        pairs: [V, V, N, 16, 16] law of the masks of two views.
    """

    rate: np.ndarray
    weight: np.ndarray
    pairs: np.ndarray


_VIEWS = {}


def run_views(transform, process, u, eps=0.0):
    """Runs a transform and a Bernoulli process at the base quantiles ``u`` [N], once."""
    case = (transform.name, transform.views, process, np.asarray(u).tobytes(), eps)
    by_name = not transform.members and transform.phase != Phase.WARP  # warps of one name differ
    if case not in _VIEWS or not by_name:
        _VIEWS[case] = _run_views(transform, process, u, eps)
    return _VIEWS[case]


def _run_views(transform, process, u, eps):
    views, asked = transform.views, len(u)
    # Few shapes, so that little has to be compiled.
    count = 128 if asked <= 128 else 4096
    u = np.append(u, np.full(count - asked, 0.5))
    law, shape = truncated_law(eps), (views, count, 16, 4)

    @quick
    def rates(u):
        return jax.nn.sigmoid(-law.icdf(draw_at(transform, u, jnp.full((count, 1), 0.5)).u))

    @quick
    def corrupt(u, cells, noise):
        draw = draw_at(transform, u, cells)
        logsnr, ones = law.icdf(draw.u), jnp.ones(draw.noise.shape, bool)
        out = process.corrupt(jnp.zeros(ones.shape, int), logsnr, draw.noise, ones)
        spread = jnp.broadcast_to(logsnr[:, :, None], (*shape[:3], 1))
        each = process.corrupt(jnp.zeros(shape, int), spread, noise, jnp.ones(shape, bool))
        return out.target_mask, each.target_mask, each.log_weight[..., 0], draw.log_weight

    rate = np.asarray(rates(np.float32(u)), np.float64)[..., 0]
    cells = noise_cells(rate, views)
    noise = np.where(BITS, rate[..., None, None] / 2, (1 + rate[..., None, None]) / 2)
    middles = (cells[:, :-1] + cells[:, 1:]) / 2
    seen = corrupt(np.float32(u), np.float32(middles), np.float32(noise))
    masked, each = (np.asarray(mask, int) for mask in seen[:2])  # [V, N, cells], [V, N, 16, 4]
    np.testing.assert_array_equal(each, np.broadcast_to(BITS, shape))
    weight = np.exp(np.asarray(seen[2], np.float64)) * np.exp(np.asarray(seen[3], np.float64))

    chance = np.diff(cells)
    pairs = np.empty((views, views, count, 16, 16))
    for a, b in itertools.product(range(views), repeat=2):
        joint = np.empty((count, 2, 2))
        for i, j in itertools.product(range(2), repeat=2):
            joint[:, i, j] = (chance * (masked[a] == i) * (masked[b] == j)).sum(-1)
        pairs[a, b] = np.prod(
            [joint[:, BITS[:, None, i], BITS[None, :, i]] for i in range(4)], axis=0
        )
    return Views(rate[:, :asked], weight[:, :asked], pairs[:, :, :asked])


def moments(transform, process, u, du, eps=0.0, rows=toys.ROWS, table=None):
    """Mean, A, B, C of the estimate with levels u of weight du; gradients where table has them."""
    table = loss_table(rows)[..., None] if table is None else table
    first, second = view_means(run_views(transform, process, u, eps), table)
    row_mean = np.einsum("rnp,n->rp", first, du)
    square = (first**2).sum(-1)
    total = PROBABILITIES @ row_mean
    return Moments(
        mean=total.squeeze(),
        pattern=PROBABILITIES @ ((second - square) @ du),
        rate=PROBABILITIES @ (square @ du - (row_mean**2).sum(-1)),
        data=PROBABILITIES @ (row_mean**2).sum(-1) - (total**2).sum(),
    )


def view_means(seen, table):
    """First [rows, N, parts] and second [rows, N] moment of the mean over views of S.

    The table has shape [rows, 16, parts].
    """
    views = len(seen.rate)
    values = seen.weight[:, None, :, :, None] * table[None, :, None]  # [V, rows, N, 16, parts]
    single = [seen.pairs[a, a].diagonal(axis1=1, axis2=2) for a in range(views)]
    first = sum(np.einsum("nm,rnmp->rnp", single[a], values[a]) for a in range(views)) / views
    second = 0.0
    for a, b in itertools.product(range(views), repeat=2):
        half = np.einsum("nij,rnjp->rnip", seen.pairs[a, b], values[b])
        second = second + (values[a] * half).sum((2, 3)) / views**2
    return first, second


def draw_at(transform, u, noise):
    """``transform`` applied to the given levels [N] and noise [N, E], one view."""
    u, noise = jnp.asarray(u, jnp.float32), jnp.asarray(noise, jnp.float32)
    spec = DrawSpec(len(u), 1, noise.shape[1:])
    start = Draw(u[None, :, None], jnp.zeros((1, len(u), 1)), noise[None])
    return transform.draw(jax.random.key(0), transform.init(spec), start, spec)


def noise_cells(rate, views):
    """[N, cells + 1] cuts of (0, 1) between which no view changes its mind about a position."""
    turns = np.arange(views) / views
    cuts = [np.zeros(rate.shape[1:]), np.ones(rate.shape[1:])]
    for p, turn in itertools.product(rate, turns):
        cuts += [np.mod(p - turn, 1), np.mod(1 - p - turn, 1), np.full(p.shape, turn)]
    return np.sort(np.stack(cuts, axis=-1), axis=-1)


def fixed_count_draws(transform, u):
    """Every (level, order of ranks) once, levels slowest, passed through ``transform``."""
    orders = np.array(list(itertools.permutations(range(4))))
    noise = (np.tile(orders, (len(u), 1)) + 0.5) / 4
    return draw_at(transform, np.repeat(u, len(orders)), noise)


def fixed_count_moments(transform, u=(0.125, 0.375, 0.625, 0.875), du=0.25):
    """Mean, A, B, C over base quantiles u of weight du and all 24 orders, through the objective."""
    objective = objectives.masked_nelbo(corruption.fixed_count(toys.MASK_ID))
    params, model, u = toys.toy_params(), toys.Toy(), np.asarray(u)
    count = 24 * len(u)

    def run():
        draw = fixed_count_draws(transform, u)
        draw = jax.tree.map(lambda a: jnp.tile(a, (1, 3, 1)), draw)
        batch = jax.tree.map(lambda a: jnp.repeat(a, count, axis=0), toys.toy_batch())
        stats = objective.loss(lambda *a: model.apply(params, *a), batch, draw)
        return stats.weight * stats.raw * jnp.exp(draw.log_weight)

    losses = np.asarray(quick(run)(), np.float64).mean((0, 2)).reshape(3, len(u), 24)
    du = np.broadcast_to(du, len(u))
    level = losses.mean(axis=2)
    row = level @ du
    return Moments(
        mean=PROBABILITIES @ row,
        pattern=PROBABILITIES @ (losses.var(axis=2) @ du),
        rate=PROBABILITIES @ (level**2 @ du - row**2),
        data=PROBABILITIES @ row**2 - (PROBABILITIES @ row) ** 2,
    )


def v(m):
    """Pattern variance of S / m."""
    return level_moments(m)[0]


def g(m):
    """Mean of S / m."""
    return level_moments(m)[1]


def c(m):
    """Variance over rows of the mean of S / m."""
    return level_moments(m)[2]


def s(m):
    """Second moment of S / m."""
    return level_moments(m)[3]


def fine_density(moment, eps=1e-3, bins=1500):
    """A density proportional to sqrt(moment(m)) in fine bins, spaced closely at both ends."""
    up = np.geomspace(eps, 1, bins)
    down = 1 - np.geomspace(1e-4, 1 - eps, bins // 4)
    edges = ((1 - np.unique(np.concatenate([up[:-1], [1.0], down[down > 0.6]]))) / (1 - eps))[::-1]
    root = mean_over_bins(edges, eps, lambda m: np.sqrt(moment(m)), 4)
    return piecewise_density(edges, np.diff(edges) * np.maximum(root, 1e-30))


@functools.cache
def _warp_function(eps):
    """Jitted (density, u) -> rate and log weight, compiled once per type and size of density."""

    def run(density, u):
        draw = warp(Draw(u[None, :, None], jnp.zeros((1, len(u), 1)), None), density)
        return jax.nn.sigmoid(-truncated_law(eps).icdf(draw.u[0, :, 0])), draw.log_weight[0, :, 0]

    return quick(run)


def warped(density, u, eps=1e-3):
    """Masking rates and importance weights that ``importance(density)`` makes of quantiles u."""
    size = 2 ** int(np.ceil(np.log2(max(len(u), 128))))  # few shapes
    padded = np.append(u, np.full(size - len(u), 0.5)).astype(np.float32)
    rate, log_weight = (a[: len(u)] for a in _warp_function(eps)(density, padded))
    return np.asarray(rate, np.float64), np.exp(np.asarray(log_weight, np.float64))


def drawn(transform, u, eps=0.0):
    """Masking rates and importance weights that a warp makes of quantiles u."""
    law = truncated_law(eps)

    def run(u):
        draw = draw_at(transform, u, jnp.full((len(u), 1), 0.5))
        return jax.nn.sigmoid(-law.icdf(draw.u[0, :, 0])), draw.log_weight[0, :, 0]

    rate, log_weight = quick(run)(jnp.asarray(u, jnp.float32))
    return np.asarray(rate, np.float64), np.exp(np.asarray(log_weight, np.float64))


def decomposition(density, eps=1e-3, order=2):
    """Mean and A, B, C, levels independent, one Bernoulli mask."""
    u, du = density_nodes(density, order)
    m, weight = warped(density, u, eps)
    mean = du @ (weight * g(m))
    values = loss_table()[:, None] / m[:, None]
    first = (values * bernoulli_law(m)).sum(-1)
    row = first @ (du * weight)
    pattern = du @ (weight**2 * v(m))
    rate = PROBABILITIES @ (first**2 @ (du * weight**2) - row**2)
    return Moments(mean, pattern, rate, PROBABILITIES @ row**2 - mean**2)


def model_fn(*inputs):
    """The toy network with its parameters."""
    return toys.Toy().apply(toys.toy_params(), *inputs)
