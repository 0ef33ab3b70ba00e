"""The variance meter: where the variance of a loss or gradient comes from, and what removes it."""

from mdm_jax.meter.choice import (
    Ranked,
    efficiency_at_equal_passes,
    first_tied,
    rank,
    warm_up,
)
from mdm_jax.meter.clip_search import (
    ClipChoice,
    candidate_intervals,
    check_feasible,
    gradient_noise_to_signal,
    make_clip_search,
    raw_variance,
    relative_variance,
)
from mdm_jax.meter.decompose import (
    Decomposition,
    decompose,
    decompose_by_probes,
    decompose_gradients,
)
from mdm_jax.meter.efficiency import (
    Comparison,
    Efficiency,
    compare,
    efficiency,
    efficiency_with_data,
)
from mdm_jax.meter.levels import (
    LevelTable,
    LevelWeighting,
    binned_moments,
    effective_weighting,
    measure_levels,
    optimal_density,
    rate_grid,
    warp_density,
)
from mdm_jax.meter.subject import Estimator, Subject, make_estimator
