"""The labels that say what an estimator's expectation is."""

BIAS_LABELS = ("exact", "truncated", "biased")
"""From best to worst.

``exact``: the expectation of losses and gradients is that of the whole bound, for every model.
``truncated``: it is the expectation over a stated part of the noise range.
``biased``: it is something else, by design.
"""


def worst_bias(*labels: str) -> str:
    """The worst of the labels, which is that of whatever is made of their bearers.

    Raises:
        ValueError: if a label is none of :data:`BIAS_LABELS`.
    """
    for label in labels:
        if label not in BIAS_LABELS:
            raise ValueError(f"bias must be one of {', '.join(BIAS_LABELS)}, got {label!r}")
    return max(labels, key=BIAS_LABELS.index)
