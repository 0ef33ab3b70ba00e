"""``mdm tune-levels`` on a toy whose best pair of weighting and grid is known by enumeration.

Data: a mixture of two normals. Network: the posterior mean of a mixture whose modes are too near,
times one weight, fitted by least squares with a normal weighting over the logSNR. Noisy levels want
a weight of 2, clean ones 1; DDIM of five steps shrinks the samples, so that a weight between is the
best, with a grid that belongs to it. Distances are of quantiles, exact, plus noise of known size.
"""

import functools

import numpy as np
import pytest
from scipy import optimize, special

from mdm_jax.launch.tune import command, report, search

pytestmark = pytest.mark.keyless

MEAN, STD, ASSUMED = 0.9, 0.3, 0.6
LEVELS = np.linspace(-8, 8, 65)
SHIFTS = np.linspace(-5, 5, 81)
NOISE, REPLICATES, STEPS = 0.003, 4, 900
ERROR = NOISE / REPLICATES**0.5
QUANTILES = (np.arange(64) + 0.5) / 64


def posterior_mean(x, logsnr):
    """Of the mixture with its modes at +-ASSUMED; x is data plus noise."""
    kept = STD**2 / (STD**2 + np.exp(-logsnr))
    pull = np.tanh(ASSUMED * x * kept / STD**2)
    return kept * x + (1 - kept) * ASSUMED * pull


@functools.cache
def moments():
    """E[D x0] and E[D^2] by level, with Gauss-Hermite quadrature (the modes are symmetric)."""
    nodes, share = np.polynomial.hermite_e.hermegauss(31)
    share = np.outer(share, share) / share.sum() ** 2
    clean = (MEAN + STD * nodes)[:, None]
    found = []
    for level in LEVELS:
        guess = posterior_mean(clean + np.exp(-level / 2) * nodes, level)
        found.append([np.sum(share * guess * clean), np.sum(share * guess**2)])
    return np.array(found).T


def trained(centre):
    """The network's weight under ``W = N(centre, 1)`` on the error of eps."""
    weight = np.exp(LEVELS - 0.5 * (LEVELS - centre) ** 2)
    cross, square = moments() @ weight
    return cross / square


@functools.cache
def data_quantiles():
    def excess(x, share):
        return np.mean(special.ndtr((x + np.array([-MEAN, MEAN])) / STD)) - share

    return np.array([optimize.brentq(excess, -5, 5, args=(q,)) for q in QUANTILES])


def grid(shift):
    """Five equal steps of the angle of the cosine schedule, shifted."""
    angle = np.arctan(np.exp(-(np.array([-6.0, 6.0]) - shift) / 2))
    return shift - 2 * np.log(np.tan(np.linspace(*angle, 6)))


def distances(weight):
    """Root mean squared error of the quantiles of samples, for each of SHIFTS."""
    levels = np.stack([grid(shift) for shift in SHIFTS])
    x = special.ndtri(QUANTILES) * np.sqrt(np.exp(-levels[:, :1]) + MEAN**2 + STD**2)
    for now, following in zip(levels.T[:-1, :, None], levels.T[1:, :, None]):
        kept = np.exp((now - following) / 2)
        x = kept * x + (1 - kept) * weight * posterior_mean(x, now)
    return np.sqrt(np.mean((np.sort(x, axis=-1) - data_quantiles()) ** 2, axis=-1))


def judge(point, steps, seed, last):
    """Training from a poor start, or with ``N(centre, 1)``; noise shrinks with training."""
    exact = distances(trained(point[0] if point else 3.0))
    rng = np.random.default_rng([seed, steps, last])
    noise = rng.normal(0, NOISE * np.sqrt(STEPS / steps), REPLICATES)  # of samples: shared
    return {"distances": {5: np.min(exact) + 10 / steps + noise}, "shift": np.argmin(exact)}


@functools.cache
def enumerated():
    """Centres, and the least distance of each over all shifts."""
    centres = np.linspace(-6, 6, 121)
    return centres, np.array([distances(trained(centre)) for centre in centres])


@pytest.fixture(scope="module")
def found():
    rungs = tuple(search.Rung(steps, runs) for steps, runs in ((100, 12), (300, 8), (900, 6)))
    ranges = (search.Range("gaussian.centre", -6.0, 6.0),)
    return command.tune(command.Plan(ranges, {}, rungs, STEPS, 0, (1, 2, 3)), judge)


def test_the_best_pair_is_found_within_its_error(found):
    """The grid of the found centre is the enumerated one, as is the centre, within 0.3 logSNR."""
    centres, values = enumerated()
    least = values.min(1)
    inside = centres[least < least.min() + 4 * ERROR]
    assert 0.3 < np.ptp(inside) < 2  # not so wide that any centre would do
    [name] = found["settings"]
    centre = float(found["settings"][name])
    assert inside[0] <= centre <= inside[-1]
    row, column = np.unravel_index(values.argmin(), values.shape)
    best = judge((centre,), STEPS, 0, True)["shift"]
    assert abs(SHIFTS[best] - SHIFTS[column]) <= 0.5
    assert abs(centre - centres[row]) <= 0.5 * np.ptp(inside)


def test_what_it_gained_over_the_start(found):
    """The difference of both, exactly known, lies in its interval; other seeds than the search."""
    centre = float(found["settings"]["gaussian.centre"])
    paired = found["scores"][report.BEST]["against_baseline"]
    gain = distances(trained(centre)).min() - distances(trained(3.0)).min()
    assert paired["mean"] == pytest.approx(gain, abs=1e-9)  # the noise is shared, and cancels
    assert gain < -0.1 and paired["significant"]
    assert set(found["scores"][report.START]["scores"]) == {"1", "2", "3"}


def test_two_numbers_of_a_bowl():
    """Exactly known minimum; five rungs halve the box four times."""

    def bowl(point, steps):
        if not point:
            return np.full(2, 9.0)
        return np.full(2, (point[0] - 0.3) ** 2 + 4 * (point[1] - 2.2) ** 2)

    ranges = (search.Range("a", -2.0, 2.0), search.Range("b", 1.0, 5.0))
    rungs = [search.Rung(3**k, 12) for k in range(5)]
    tried = search.halving(bowl, ranges, rungs)
    assert len(tried) == 60 and tried[0].point == ()
    np.testing.assert_allclose(search.best(tried).point, [0.3, 2.2], atol=0.1)


def test_the_start_may_be_the_best():
    """Then nothing is trained for the comparison."""

    def judge(point, steps, seed, last):
        assert not last
        return {"distances": {4: np.full(2, 1.0 + len(point))}}

    rungs, ranges = (search.Rung(1, 3), search.Rung(3, 2)), (search.Range("a", 0.0, 1.0),)
    record = command.tune(command.Plan(ranges, {}, rungs, 9, 0, (1, 2)), judge)
    assert record["settings"] == {} and record["best_run"] is None and record["scores"] == {}
