"""Labels of estimators and losses, and the units of their constants.

Two labels: whether the estimate is unbiased for the likelihood bound of an answer (``elbo``), and
for the gradient of the expected reward of the model that writes the answers (``policy_gradient``);
"none" where a method does not estimate it.
"""

from typing import NamedTuple

LABELS = ("exact", "biased", "none")
PER_ANSWER, PER_TOKEN = "nats_per_answer", "nats_per_token"


class Constant(NamedTuple):
    """A constant that multiplies, or bounds, log-probabilities of this unit."""

    value: float
    unit: str


def per_answer(value: float) -> Constant:
    """A constant for log-probabilities in nats per answer, such as beta in 1/nats."""
    return Constant(value, PER_ANSWER)


def per_token(value: float) -> Constant:
    """A constant for log-probabilities divided by the number of tokens of the answer."""
    return Constant(value, PER_TOKEN)


def in_unit(constant: Constant, unit: str, name: str) -> float:
    """The value of a constant of this unit; TypeError for a bare number, ValueError for another."""
    make = {PER_ANSWER: "per_answer", PER_TOKEN: "per_token"}[unit]
    if not isinstance(constant, Constant):
        raise TypeError(
            f"{name} must state its unit, as in alignment.{make}({constant!r}); got a bare number"
        )
    if constant.unit != unit:
        raise ValueError(
            f"{name} is in {unit} here, got {constant.value} in {constant.unit}; over answers of L "
            f"tokens the two differ by the factor L: convert it, and write alignment.{make}(...)"
        )
    return constant.value


class Method(NamedTuple):
    """What a method estimates, and what it costs.

    Attributes:
        elbo, policy_gradient: of :data:`LABELS`.
        unit: of its constants, ``PER_ANSWER`` or ``PER_TOKEN``; "" without any.
        passes: forward passes of an answer for each view of the draw, of each scored network.
    """

    elbo: str
    policy_gradient: str
    unit: str
    passes: int
    source: str


METHODS = {
    "dpo": Method("exact", "none", PER_ANSWER, 1, "VRPO, arXiv 2505.19223"),
    "ipo": Method("exact", "none", PER_ANSWER, 1, "Azar et al. 2023"),
    "simpo": Method("exact", "none", PER_TOKEN, 1, "Meng et al. 2024"),
    "kto": Method("exact", "none", PER_ANSWER, 1, "arXiv 2510.23658"),
    "trace": Method("none", "exact", PER_ANSWER, 1, "AGRPO, arXiv 2510.04019"),
    "espo": Method("exact", "biased", PER_TOKEN, 2, "arXiv 2512.03759"),
    "elbo": Method("exact", "biased", PER_ANSWER, 1, "the bound of the run's chain"),
    "gdpo": Method("biased", "biased", PER_TOKEN, 1, "arXiv 2510.08554"),
    "coupled": Method("biased", "biased", PER_TOKEN, 3, "DiffuCoder, arXiv 2506.20639"),
    "unigrpo": Method("biased", "biased", PER_TOKEN, 1, "arXiv 2505.15809"),
    "d1": Method("biased", "biased", PER_TOKEN, 1, "diffu-GRPO, arXiv 2504.12216"),
    "wd1": Method("biased", "biased", "", 1, "arXiv 2507.08838"),
    "spg": Method("biased", "biased", "", 1, "arXiv 2510.09541"),
    "rejection": Method("exact", "biased", "", 1, "RAFT, arXiv 2304.06767"),
}
"""Methods by their config name; those of preferences estimate no policy gradient."""
