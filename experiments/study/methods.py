"""The methods that the stability study compares, as data."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mdm_jax.launch import config as launch_config

PUBLISHED = {"corruption.name": "bernoulli", "law.name": "clipped", "law.clipped.low": 1e-3}
"""Independent masks at a rate uniform on [0.001, 1], as LLaDA and the training scripts of
arXiv 2511.18159 draw it. Below that end the variance of the weight 1/m would be infinite."""

_FIXED = {"corruption.name": "fixed_count", "law.name": "linear"}
_FLAT = {"weighting.name": "p2", "weighting.p2.k": 1.0, "weighting.p2.gamma": 1.0}
"""A factor m on the bound's weight 1/m: ``1 / (1 + exp(logsnr))`` is the masking rate."""

_PPOTS = {
    "variance.ppots.num_bins": 16,
    "variance.ppots.decay": 0.99,
    "variance.ppots.warmup_steps": 20,
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A way of training.

    Attributes:
        label: of tables and plots.
        order: the variance chain.
        views: forward passes per row.
        settings: config fields by dotted name.
        of_task: further ones by the task's name, such as what was fitted to it.
        same_as: name of a method that this one trains as, bit for bit; it is not run again.
        note: printed below the tables.
    """

    label: str
    order: tuple[str, ...] = ()
    views: int = 1
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    of_task: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    same_as: str = ""
    note: str = ""


METHODS: dict[str, Method] = {
    "standard": Method(
        "standard",
        settings=PUBLISHED,
        note="independent rates on [0.001, 1], independent masks, weight 1/m (LLaDA)",
    ),
    "clipped": Method(
        "clipped",
        ("clipped",),
        settings=PUBLISHED | {"law.name": "linear"},
        note="rates in [0.3, 0.8] (BD3-LM); truncated: the bound's part outside is not trained",
    ),
    "strats": Method(
        "StraTS",
        ("coarse_strata",),
        settings=PUBLISHED,
        note="as many strata as the root of the batch, as the published script has it; that this "
        "is the paper's StraTS is our inference",
    ),
    "isad": Method(
        "ISAD",
        settings=PUBLISHED | {"corruption.name": "bernoulli_shifted_rate"},
        note="rare tokens masked with a rate 0.2 higher and weight 1/q, as the published script "
        "has it; biased: the context of a token follows another law",
    ),
    "ema": Method(
        "EMA",
        same_as="standard",
        note="an average of past losses subtracted from the loss leaves every gradient as it is, "
        "bit for bit, so this row is that of standard training and was not run again",
    ),
    "mirror": Method("MIRROR", ("mirror",), 2, PUBLISHED),
    "ppots": Method(
        "P-POTS",
        ("ppots",),
        settings=PUBLISHED | _PPOTS,
        note="bins that learn while training, with an exact weight; the paper fits a curve to a "
        "calibration run instead (`ppots_parametric`)",
    ),
    "ppots_mirror": Method("P-POTS + MIRROR", ("ppots", "mirror"), 2, PUBLISHED | _PPOTS),
    "fixed_counts": Method("fixed counts", settings=_FIXED),
    "fixed_counts_rotated": Method(
        "fixed counts + rotated views",
        ("rotate_ranks",),
        4,
        _FIXED | {"variance.rotate_ranks.views": 4},
    ),
    "stratified_mirror": Method(
        "fixed counts + stratified + MIRROR", ("stratified", "mirror"), 2, _FIXED
    ),
    "recommended": Method(
        "recommended chain",
        tuple(launch_config.get_config().variance.order),
        settings=_FIXED,
        note="fixed counts, stratified rates, P-POTS by the gradient norm at the logits: the "
        "default of `mdm_jax/launch/config.py`",
    ),
    "recommended_for_answers": Method(
        "recommended chain for answers",
        ("stratified", "clipped"),
        settings=_FIXED,
        note="fixed counts, stratified rates in [0.3, 0.8]: truncated, for models that "
        "are judged by their answers and not by a likelihood",
    ),
    "autoregressive": Method(
        "autoregressive",
        settings={"process": "autoregressive"},
        note="the same network under a causal mask; its likelihood is exact, where the others "
        "have a bound",
    ),
}

AUTO = Method(
    "auto",
    ("auto",),
    settings=_FIXED | {"variance.auto.budget": 1.0, "variance.auto.passes": 4},
    note="`variance.order=auto` measures before the first step, and here may spend as many passes "
    "as the run itself (2 % by default): 1,792 in batches of 4, on top of the run's 1,920; what it "
    "chose in each run stands in its `auto.jsonl`",
)

ATTEMPTS: dict[str, Method] = {
    "truncated_slopes": Method(
        "rates in [0.3, 0.8], stratified, P-POTS by gradient norm",
        ("stratified", "ppots_slopes"),
        settings={
            "corruption.name": "fixed_count",
            "law.name": "clipped",
            "law.clipped.low": 0.3,
            "law.clipped.high": 0.8,
        },
    ),
    "higher_rates": Method(
        "rates in [0.4, 0.9], stratified",
        ("stratified", "clipped"),
        settings=_FIXED | {"variance.clipped.low": 0.4, "variance.clipped.high": 0.9},
    ),
    "wider_rates": Method(
        "rates in [0.1, 0.9], stratified",
        ("stratified", "clipped"),
        settings=_FIXED | {"variance.clipped.low": 0.1, "variance.clipped.high": 0.9},
    ),
    "truncated_mirror": Method(
        "rates in [0.3, 0.8], stratified, MIRROR",
        ("stratified", "clipped", "mirror"),
        2,
        _FIXED,
    ),
    "highest_rates": Method(
        "rates in [0.5, 1], stratified",
        ("stratified", "clipped"),
        settings=_FIXED | {"variance.clipped.low": 0.5, "variance.clipped.high": 1.0},
    ),
    "truncated_flat": Method(
        "rates in [0.3, 0.8], stratified, flat weight",
        ("stratified", "clipped"),
        settings=_FIXED | _FLAT,
    ),
}
"""Further attempts on Sudoku, whose seeds differ most: other ranges, and ranges combined with other
methods."""

FLAT_WEIGHTS: dict[str, Method] = {
    "flat": Method(
        "flat weight, stratified",
        ("stratified",),
        settings=_FIXED | _FLAT,
        note="cross-entropy at every masked position with the same weight at all rates, in place "
        "of 1/m: no bound, but the same minimiser, since every rate is trained",
    ),
    "flat_slopes": Method(
        "flat weight, stratified, P-POTS by gradient norm",
        ("stratified", "ppots_slopes"),
        settings=_FIXED | _FLAT,
    ),
}
"""Variance reduced by the weight instead of the range of rates."""

_BELL = {"corruption.name": "fixed_count", "law.name": "logit_normal"}

FIELD: dict[str, Method] = {
    **{name: METHODS[name] for name in ("standard", "recommended_for_answers")},
    "highest_rates": ATTEMPTS["highest_rates"],
    **{name: METHODS[name] for name in ("ppots", "mirror", "ppots_mirror", "fixed_counts")},
    "pairs": Method(
        "complementary pairs",
        ("stratified", "complement"),
        2,
        {"corruption.name": "rounded_count", "law.name": "linear"},
        note="two views predict every token once, whatever the count; exact",
    ),
    "recommended": METHODS["recommended"],
    "auto": Method(
        "auto",
        ("auto",),
        settings=_FIXED,
        note="`variance.order=auto` measures before the first step, by 2 % of the passes; what it "
        "chose in each run stands in its `auto.jsonl`",
    ),
    **FLAT_WEIGHTS,
    "bell": Method(
        "bell-shaped rates, weight kept",
        ("stratified",),
        settings=_BELL,
        note="logit-normal rates with the bound's importance weight: only the variance moves",
    ),
    "bell_unweighted": Method(
        "bell-shaped rates, no weight",
        ("stratified",),
        settings=_BELL | {"weighting.name": "law"},
        note="logit-normal rates that count as often as they are drawn: a reweighting",
    ),
    "partition": Method(
        "partition model",
        ("stratified",),
        settings={"process": "partition", "law.name": "linear"},
        note="another network (PGM), of as many blocks and one pass a row; in tables of accuracy "
        "and bits only, its gradients are of other parameters",
    ),
}
"""What the field proposes beside clipped ranges, by the issue of its estimators. ``mirror_plus``,
GenMD4 and STORM were tried and left out (``experiments/tried``)."""

CURVES: dict[str, tuple[float, ...]] = {
    "sudoku6": (4.34593, 0.000302749, 0.626079, 1.0, 1.99702, 1.30438, 2.7626),
    "text": (5.52693, 9.14966, 1.69343, 1.0, 46.0061, 0.416664, 6.83931),
    "sudoku4_noisy": (0.00101605, 3.15329, 0.816492, 1.0, 21.2079, 1.31461e-08, 1.00001),
}
"""Curves of P-POTS by task, in the order of ``EprParameters``: ``mdm variance --fit`` of standard
training's last parameters, seed 100 (suite ``curves``)."""

PPOTS_UNWEIGHTED = Method(
    "P-POTS without its weight",
    ("ppots_unweighted",),
    settings=PUBLISHED | {"weighting.clamp": 10.0},
    of_task={
        task: {"variance.ppots_unweighted.parameters": curve} for task, curve in CURVES.items()
    },
    note="as its code trains: rates from a curve fitted to a run of seed 100, no weight 1/p, at "
    "most 10 nats per answer token; biased",
)
