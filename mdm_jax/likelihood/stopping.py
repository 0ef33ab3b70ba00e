"""Sequential stopping: replicates are drawn until an interval is narrow or a sign is certain.

Rows get replicates of their estimates in rounds; what is asked are :class:`Targets`, sums of
independent parts: single rows, the total of a corpus, differences of two rows, their total. After
each round those that are settled stop, and rows that nothing unsettled needs are left out.

*Width.* Whether an interval is narrow depends on the spread alone, which for normal replicates is
independent of the mean, so looking repeatedly costs little coverage (Stein 1945; Chow and Robbins
1965; Starr 1966). Student's intervals at the level ``0.8 (1 - coverage)`` make up for what it
costs: of 95 % intervals of normal replicates, 8 at first, 94 to 96 % cover (``tests/laws``).

*Sign.* A group-sequential test (Lan and DeMets 1983) of the value 0: over all looks a wrong sign is
called certain with a probability of at most ``1 - coverage``, spent as ``log(1 + (e - 1) share of
replicates)``, which stops early where the sign is clear. Student's statistics are compared with
the normal boundaries at equal tail probabilities. Intervals are by stagewise ordering of outcomes
(Tsiatis, Rosner and Mehta 1984): of that coverage for normal replicates, although extreme means
stop early.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mdm_jax.estimates import Total, total_of

_PAYS_FOR_LOOKS = 0.8
_BISECTIONS = 30
_FEWEST = 6
_USED = 4096  # of the simulated paths, for intervals


@dataclasses.dataclass(frozen=True)
class Stop:
    """When to stop drawing replicates.

    Attributes:
        most, first, round: replicates drawn at most, before the first look, and between looks.
            ``Stop(most=8)`` draws 8.
        width: the interval is at most this wide (in the targets' unit), or None.
        sign: 0 is outside the interval, with the level held over all looks.
        coverage: of the intervals.

    ValueError for numbers below 2 (``first``, ``most``) or 1 (``round``), a width not positive, a
    coverage outside (0, 1), more than 64 looks, or a sign that fewer than 6 replicates may settle:
    they know their spread too badly (95 % intervals after 4 of them cover 92.7 %).
    """

    most: int = 64
    first: int = 8
    round: int = 4
    width: float | None = None
    sign: bool = False
    coverage: float = 0.95

    def __post_init__(self) -> None:
        if self.first < 2 or self.most < 2 or self.round < 1 or not 0 < self.coverage < 1:
            raise ValueError(
                "stopping takes first and most >= 2 replicates, rounds of at least 1 and a "
                f"coverage in (0, 1), got {self}"
            )
        if self.width is not None and not self.width > 0:
            raise ValueError(f"the width of an interval must be positive, got {self.width}")
        if len(self.looks) > 64:
            raise ValueError(
                f"{len(self.looks)} looks are more than 64; take larger rounds: {self}"
            )

        if self.sign and len(self.looks) > 1 and self.looks[0] < _FEWEST:
            raise ValueError(
                f"a sign is looked at after {_FEWEST} replicates or more, else intervals do not "
                f"cover what they say: raise first, or set most to first for one look; got {self}"
            )

    @property
    def looks(self) -> tuple[int, ...]:
        """Numbers of replicates at which it looks; one where nothing may stop it."""
        if self.width is None and not self.sign:
            return (self.most,)
        return (*range(min(self.first, self.most), self.most, self.round), self.most)

    def describe(self) -> str:
        """In words, for an audit."""
        if len(self.looks) == 1:
            return f"{self.most} replicates"
        wanted = [f"a {self.coverage:.0%} interval of width {self.width}"] * bool(self.width)
        wanted += ["a certain sign (alpha spending)"] * self.sign
        return f"{self.looks[0]} to {self.most} replicates, until {' or '.join(wanted)}"


def narrow(replicates: int, width: float) -> Stop:
    """From ``replicates`` (two or more), and up to 8 times as many, until an interval is narrow."""
    round_ = max(4, -(-replicates // 8))  # at most 57 looks
    return Stop(8 * replicates, first=replicates, round=round_, width=width)


class Targets(NamedTuple):
    """What is estimated: sums over independent parts of weighted sums over rows.

    Attributes:
        row, weight, part: [E] row number, weight and part number of each term. Rows of one part may
            have common noise.
        target: [P] number of each part's target, 0..T-1 with none left out.
    """

    row: np.ndarray
    weight: np.ndarray
    part: np.ndarray
    target: np.ndarray

    @property
    def number(self) -> int:
        """T, the number of targets."""
        return int(self.target.max()) + 1

    def total(self, values: np.ndarray, chosen: np.ndarray) -> Total:
        """Of the ``chosen`` [T] bool targets, from replicates [R, N] of the rows."""
        parts = np.flatnonzero(chosen[self.target])
        terms = np.flatnonzero(chosen[self.target[self.part]])
        place = np.cumsum(chosen[self.target]) - 1
        own = np.zeros((len(values), len(parts)))
        weighted = values[:, self.row[terms]] * self.weight[terms]
        np.add.at(own, (slice(None), place[self.part[terms]]), weighted)
        renumbered = (np.cumsum(chosen) - 1)[self.target[parts]]
        return total_of(own, renumbered, int(chosen.sum()))

    def rows(self, chosen: np.ndarray) -> np.ndarray:
        """[.] numbers of the rows that the chosen targets need."""
        return np.unique(self.row[chosen[self.target[self.part]]])


def each_row(rows: int) -> Targets:
    """One target for each row."""
    number = np.arange(rows)
    return Targets(number, np.ones(rows), number, number)


def total(rows: int, weight: ArrayLike = 1.0, groups: ArrayLike | None = None) -> Targets:
    """The weighted total of all rows; ``groups`` [N]: rows of one group have common noise."""
    number = np.arange(rows)
    _, groups = np.unique(number if groups is None else groups, return_inverse=True)
    parts = np.zeros(int(groups.max()) + 1, int)
    return Targets(number, np.broadcast_to(np.float64(weight), rows), groups, parts)


def differences(first: ArrayLike, second: ArrayLike, pooled: bool = False) -> Targets:
    """First row minus second row of each pair [T], or, ``pooled``, the total of these."""
    first, second = np.asarray(first), np.asarray(second)
    pair = np.arange(len(first))
    weight = np.repeat([1.0, -1.0], len(first))
    target = np.zeros_like(pair) if pooled else pair
    return Targets(np.concatenate([first, second]), weight, np.tile(pair, 2), target)


@dataclasses.dataclass(frozen=True, eq=False)
class Stopped:
    """Targets [T] as they were when they stopped, and the replicates of the rows.

    Attributes:
        value, standard_error, low, high: [T] estimate, its standard error, and interval.
        sign: [T] 1 or -1 where it is certain, else 0; 0 throughout if not asked for.
        replicates: [T] that it was settled with.
        row_values: [R, N] replicates of each row, NaN beyond those drawn.
    """

    value: np.ndarray
    standard_error: np.ndarray
    low: np.ndarray
    high: np.ndarray
    sign: np.ndarray
    replicates: np.ndarray
    row_values: np.ndarray

    @property
    def row_replicates(self) -> np.ndarray:
        """[N] replicates drawn of each row."""
        return np.sum(~np.isnan(self.row_values), axis=0)

    @property
    def row_value(self) -> np.ndarray:
        """[N] mean of each row's replicates; NaN where none was drawn."""
        total, count = np.nansum(self.row_values, axis=0), self.row_replicates
        return np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)


def replicate_until(
    draw: Callable[[np.ndarray, int, int], np.ndarray],
    rows: int,
    targets: Targets,
    stop: Stop,
    needed: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> Stopped:
    """Draws replicates of N = ``rows`` rows until the targets are settled or ``stop.most``.

    Args:
        draw: ``draw(rows [n], first, count) -> [count, n]``, replicates first..first + count - 1 of
            the rows numbered, independent over replicates and over the parts of a target.
        needed: ``needed(sign [T], open [T]) -> [T] bool``, which of the open targets still matter.

    A target whose replicates all agree is taken as exact. ValueError for NaN, naming a row.
    """
    looks, level, count = stop.looks, 1 - stop.coverage, targets.number
    unsettled, sign, replicates = np.ones(count, bool), np.zeros(count, int), np.zeros(count, int)
    fields = np.full((4, count), np.nan)
    values, before = np.full((looks[-1], rows), np.nan), 0
    for look, size in enumerate(looks):
        active = targets.rows(unsettled)
        new = draw(active, before, size - before)
        if np.isnan(new).any():
            row = active[np.isnan(new).any(axis=0)][0]
            raise ValueError(f"row {row}: the network gave NaN; look at its parameters and dtype")
        values[before:size, active], before = new, size
        numbers, found = np.flatnonzero(unsettled), targets.total(values[:size], unsettled)
        reach = found.reach(1 - level * (1 if len(looks) == 1 else _PAYS_FOR_LOOKS))
        settled = ~(found.standard_error > 0) | (size == looks[-1])
        if stop.sign:
            sign[numbers] = _certain(found, looks, look, level)
            settled |= sign[numbers] != 0
        if stop.width is not None:
            settled |= 2 * reach <= stop.width
        ends = found.value - reach, found.value + reach
        fields[:, numbers] = found.value, found.standard_error, *ends
        replicates[numbers] = size
        unsettled[numbers[settled]] = False
        if needed is not None:
            unsettled &= needed(sign, unsettled)
        if stop.sign:
            done = ~unsettled[numbers]
            ends = _stagewise(Total(*(field[done] for field in found)), looks, look, level)
            fields[2:, numbers[done]] = ends
        if not unsettled.any():
            break
    return Stopped(*fields, sign, replicates, values[:before])


# --- boundaries of a group-sequential test --------------------------------------------------------


class Paths(NamedTuple):
    """Simulated sums of M normal replicates of mean 0 and variance 1 at K looks.

    Attributes:
        limits: [K] size of Student's statistic from which the sign is certain.
        pivot, error: [K, M] Student's statistics and their denominators.
        up, down: [K, M] the means from which on, and down to which, a path has by then left the
            limits.
    """

    limits: np.ndarray
    pivot: np.ndarray
    error: np.ndarray
    up: np.ndarray
    down: np.ndarray


@functools.lru_cache(maxsize=64)
def simulated_paths(looks: tuple[int, ...], level: float, parts: int) -> Paths:
    """65536 paths of the total of ``parts`` alike (fewer beyond 512 replicates), with limits that
    spend ``level`` over the looks, ``level log(1 + (e - 1) R / R_last)`` of it up to R replicates.
    """
    rng, sizes = np.random.default_rng(0), np.array(looks)
    number = max(min(2**16, 2**25 // looks[-1]), _USED)
    steps = rng.standard_normal((looks[-1], number), np.float32)
    means = np.cumsum(steps, axis=0)[sizes - 1] / sizes[:, None]
    squares = np.cumsum(steps**2, axis=0)[sizes - 1] - sizes[:, None] * means**2
    if parts > 1:  # what varies beside the total adds squares alone
        more = (parts - 1) * np.diff(sizes, prepend=1)
        squares = squares + np.cumsum(rng.chisquare(more[:, None], squares.shape), axis=0)
    squares = np.maximum(squares, np.finfo(np.float32).tiny)  # of two replicates nearly alike
    error = np.sqrt(squares / (parts * (sizes - 1) * sizes)[:, None])
    pivot, limits, alive = means / error, [], np.ones(number, bool)
    for look, size in enumerate(looks):
        spent = level * math.log1p((math.e - 1) * size / looks[-1])
        left = number - round(spent * number)  # paths to be inside after this look
        inside = np.sort(np.abs(pivot[look, alive]))
        limits.append((inside[left - 1] + inside[min(left, len(inside) - 1)]) / 2)
        alive &= np.abs(pivot[look]) < limits[-1]
    reach = np.array(limits)[:, None] * error
    up, down = np.minimum.accumulate(reach - means), np.maximum.accumulate(-reach - means)
    return Paths(np.array(limits), *(a[:, :_USED] for a in (pivot, error, up, down)))


def _parts(found: Total, size: int) -> np.ndarray:
    """Number of parts alike [T], a power of 2, that has about the degrees of freedom found."""
    share = np.clip(found.freedom / (size - 1), 1, 1024)
    return (2 ** np.round(np.log2(share))).astype(int)


def _certain(found: Total, looks: tuple[int, ...], look: int, level: float) -> np.ndarray:
    """[T] 1 or -1 where the value's sign is certain at this look, else 0."""
    parts = _parts(found, looks[look])
    limits = {n: simulated_paths(looks, level, n).limits[look] for n in set(parts.tolist())}
    reach = np.array([limits[n] for n in parts.tolist()]) * found.standard_error
    return np.where(np.abs(found.value) > reach, np.sign(found.value), 0).astype(int)


def _stagewise(
    found: Total, looks: tuple[int, ...], look: int, level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Interval [T] of targets that stop at a look, by stagewise ordering; Student's at the first.

    Its ends are the means under which a higher outcome (left the limits upwards earlier, or is here
    with a larger statistic) has the probability level / 2, or 1 - level / 2. The unknown deviation
    is that which makes a path's error the one found.
    """
    reach = found.reach(1 - level)
    low, high = found.value - reach, found.value + reach
    if look == 0:
        return low, high
    parts = _parts(found, looks[look])
    for number in np.flatnonzero(found.standard_error > 0):
        higher = _higher(simulated_paths(looks, level, int(parts[number])), look, found, number)
        for ends, probability in ((low, level / 2), (high, 1 - level / 2)):
            left, right = found.value[number] + 4 * reach[number] * np.array([-1, 1])
            for _ in range(_BISECTIONS):
                middle = (left + right) / 2
                left, right = (middle, right) if higher(middle) < probability else (left, middle)
            ends[number] = (left + right) / 2
    return low, high


def _higher(paths: Paths, look: int, found: Total, number: int) -> Callable[[float], float]:
    """Probability of a higher outcome than that of a target, as a function of its mean."""
    value, error = found.value[number], found.standard_error[number]
    scale, pivot = paths.error[look] / error, paths.pivot[look]
    up, down = paths.up[look - 1], paths.down[look - 1]

    def higher(mean: float) -> float:
        unit = mean * scale
        here = (unit < up) & (unit > down) & (pivot > (value - mean) / error)
        return float(np.mean((unit >= up) | here))

    return higher
