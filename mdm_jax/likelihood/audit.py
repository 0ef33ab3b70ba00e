"""What a likelihood is of, and how it was estimated: a line beside every number."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mdm_jax.types import ArrayLike


@dataclasses.dataclass(frozen=True)
class Audit:
    """All that must be the same for two likelihoods to be compared.

    Attributes:
        scored: tokens that are scored, and those of special ids among them, as of
            :func:`scored_tokens`.
        design: of the estimator (``Likelihood.design``): levels, masks, the rates that it covers,
            and whether its mean is the bound.
        draws: passes and replicates, in words.
        parameters: which ones, such as "averaged (EMA)" or "of the last step".
        dtype: of the network's products.
    """

    scored: Mapping[str, int]
    design: str
    draws: str
    parameters: str
    dtype: str

    def line(self) -> str:
        """One line for the terminal."""
        special = ", ".join(f"{name} {n}" for name, n in self.scored.items() if name != "tokens")
        return (
            f"scored {self.scored['tokens']} tokens ({special}); {self.design}; {self.draws}; "
            f"parameters {self.parameters}, {self.dtype}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)


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
