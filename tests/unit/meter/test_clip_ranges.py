"""Candidates of the search for a range of masking rates, and setting one in a chain's state."""

import numpy as np
import pytest

from mdm_jax import meter, variance
from mdm_jax.draws import DrawSpec
from mdm_jax.variance.transform import EmptyState
from mdm_jax.variance.warps import set_clip_range

SPEC = DrawSpec(8, 2, (4,))


def test_candidates():
    found = meter.candidate_intervals(4)
    assert len(found) == len(set(found)) == 36
    assert found[:4] == ((1e-3, 1.0), (1e-3, 0.5), (0.05, 0.55), (0.1, 0.6))
    assert found[11] == (0.5, 1.0)
    assert found[-1] == (0.1, 1.0)
    assert meter.candidate_intervals(1) == ((1e-3, 1.0), (0.999, 1.0))
    with pytest.raises(ValueError, match="block_size"):
        meter.candidate_intervals(0)


@pytest.mark.parametrize("size", [1, 2])
def test_every_candidate_can_be_set(size):
    state = variance.clipped_adaptive().init(SPEC)
    for interval in meter.candidate_intervals(size):
        found = set_clip_range(state, *interval)
        np.testing.assert_array_equal(np.array([found.low, found.high]), np.float32(interval))
        assert found.high - found.low > 9e-4


def test_a_range_needs_a_place_and_two_ends():
    with pytest.raises(ValueError, match="dict with stratified"):
        set_clip_range({"stratified": EmptyState()}, 0.3, 0.8)
    state = variance.clipped_adaptive().init(SPEC)
    with pytest.raises(ValueError, match="0 <= low < high <= 1"):
        set_clip_range(state, 1.0, 1.0)
