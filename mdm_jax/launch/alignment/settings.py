"""Settings of the section ``alignment``."""

import dataclasses
from typing import Annotated, Literal

from mdm_jax.checks import Real, Whole, checked

PREFERENCES = ("dpo", "ipo", "simpo", "kto")
"""Methods on pairs (data.source=preferences); all others answer prompts and are rewarded."""


@checked
@dataclasses.dataclass(frozen=True)
class AlignmentSettings:
    """What is trained on preferences or rewards, and how (docs/alignment.md)."""

    method: Annotated[
        Literal[
            "", "dpo", "ipo", "simpo", "kto",
            "trace", "elbo", "espo", "gdpo", "coupled", "unigrpo", "d1", "wd1", "spg", "rejection",
        ],
        "loss on pairs (first four) or rewarded answers; '': the likelihood bound",
    ] = ""  # fmt: skip
    beta: Annotated[
        float, Real("(0, 1e6]", "1/nats per answer, simpo: per token", "strength of a preference")
    ] = 0.1
    gap: Annotated[float, Real("[0, 1e6]", "", "simpo: by which chosen answers are to lead")] = 0.5
    estimate: Annotated[
        Literal["crossfitted", "plain"], "coefficients from the other replicates, or from all"
    ] = "crossfitted"
    replicates: Annotated[
        int, Whole("[1, 1e3]", "draws of the chain", "of a step; crossfitted, spg: 2 or more")
    ] = 2
    answers: Annotated[
        int, Whole("[2, 1e5]", "answers", "to a prompt; train.batch_size is all answers of a step")
    ] = 8
    reward: Annotated[str, "FILE.py:NAME, NAME(prompt, answer); '': the task's checker"] = ""
    on_error: Annotated[
        Literal["error", "skip"], "answers whose reward fails: end the run, or left out and counted"
    ] = "error"
    advantages: Annotated[
        Literal["leave_one_out", "centred", "standardised"], "of an answer in its prompt's group"
    ] = "leave_one_out"
    tail: Annotated[
        Literal["answer", "masked"], "tokens after the first EOS: scored, or masked in every view"
    ] = "answer"
    clip_low: Annotated[float, Real("[0, 1]", "ratio per token", "below 1")] = 0.2
    clip_high: Annotated[float, Real("[0, 1e6]", "ratio per token", "above 1")] = 0.2
    kl: Annotated[
        float, Real("[0, 1e6]", "1/nats per answer", "k2 divergence from the reference; 0: none")
    ] = 0.0
    inner_steps: Annotated[
        int, Whole("[1, 1e4]", "updates", "of the same answers; methods with a ratio")
    ] = 1
    allow_biased: Annotated[bool, "train on a chain or weighting that is no bound"] = False
