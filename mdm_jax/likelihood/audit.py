"""What a likelihood is of, and how it was estimated: a line beside every number."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mdm_jax.types import ArrayLike


def audit_line(audit: Mapping[str, Any]) -> str:
    """One line for the terminal of all that must be the same for two figures to be compared.

    ``audit``: JSON values by name, such as the scored tokens (:func:`scored_tokens`), the design of
    the estimator, passes and replicates, which parameters, and the dtype of products.
    """

    def shown(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{name} {number}" for name, number in value.items())
        return str(value)

    return "; ".join(f"{name.replace('_', ' ')}: {shown(value)}" for name, value in audit.items())


def scored_tokens(
    rows: Iterable[tuple[ArrayLike, ArrayLike]], special: Mapping[str, int | None]
) -> dict[str, int]:
    """Number of scored tokens, and of each special id among them (None: there is no such token).

    ``rows``: tokens and eligible positions of one shape, of a row or batch. Two names may have one
    id, such as EOS and padding; both then count it.
    """
    found = {"tokens": 0} | {name: 0 for name, id_ in special.items() if id_ is not None}
    for tokens, eligible in rows:
        scored = np.asarray(tokens)[np.asarray(eligible, bool)]
        found["tokens"] += scored.size
        for name in found:
            if name != "tokens":
                found[name] += int(np.sum(scored == special[name]))
    return found
