"""Models small enough to enumerate, and their exact values."""

from mdm_jax.testing.enumeration import (
    any_order_log_likelihood,
    count_losses,
    exact_nelbo,
    exact_variance,
    mask_cross_entropies,
    mask_losses,
    rate_losses,
)
