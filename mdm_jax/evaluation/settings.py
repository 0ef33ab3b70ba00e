"""How requests are answered."""

import dataclasses
from typing import Annotated

from mdm_jax.checks import Name, Plain, Real, Whole, checked
from mdm_jax.likelihood.subsets import LEVELS, MASKS

FAST = ("threshold", "factor", "approximation", "refresh")
CACHES = ("prefix", "dual", "delayed")
FIRST = 8
"""Replicates of choices before the first look."""


@checked
@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How requests are answered; part of what an answer is known by."""

    levels: Annotated[str, Name(("", *LEVELS), "of the passes; '': the process's own")] = ""
    masks: Annotated[str, Name(("", *MASKS), "of the passes; '': the process's own")] = ""
    passes: Annotated[int, Whole("[1, 1e5]", "forward passes", "of a replicate of the design")] = 16
    replicates: Annotated[int, Whole("[1, 1e4]", "replicates", "8 times at most for a width")] = 8
    exact_up_to: Annotated[int, Whole("[0, 15]", "tokens", "answers whose subsets are all run")] = 7
    width: Annotated[float, Real("[0, 1e6]", "nats", "95 % interval to draw for; 0: none")] = 0.0
    certain: Annotated[float, Real("[0, 1)", "", "when choices stop being drawn; 0: never")] = 0.0
    check_greedy: Annotated[bool, Plain(bool, "decode to see whether it gives the answer")] = False
    rule: Annotated[str, Plain(str, "decoding rule of hub.RULES; '': the family's")] = ""
    steps: Annotated[int, Whole("[0, 1e6]", "steps", "as of hub.Rule; 0: one a token")] = 0
    block_size: Annotated[int, Whole("[0, 1e6]", "tokens", "filled together; 0: as trained")] = 0
    threshold: Annotated[float, Real("[0, 1]", "", "fill all more likely; 0: a number")] = 0.0
    factor: Annotated[float, Real("[0, 1e3]", "", "in place of the threshold; 0: none")] = 0.0
    approximation: Annotated[str, Name(("", *CACHES), "approximate caches; '': none")] = ""
    refresh: Annotated[int, Whole("[0, 1e6]", "steps", "of an approximation; 0: a block's")] = 0
    temperature: Annotated[float, Real("[0, 1e6]", "", "0: the likeliest token")] = 0.0
    top_p: Annotated[float, Real("(0, 1]", "probability", "least mass of the tokens kept")] = 1.0
    guidance: Annotated[float, Real("[0, 1e3]", "", "by the prompt, of generation")] = 0.0
    max_tokens: Annotated[int, Whole("[0, 1e6]", "tokens", "of an answer; 0: the task's")] = 0
    max_length: Annotated[int, Whole("[0, 1e7]", "tokens", "of a row; 0: the model's")] = 0
    truncate: Annotated[bool, Plain(bool, "cut long prompts on the left, else refuse")] = False
    seed: Annotated[int, Whole("[0, 4294967295]", "", "of all noise")] = 0
    rows: Annotated[int, Whole("[1, 1e5]", "rows", "of a pass on each device")] = 8

    def __post_init__(self):
        if self.width and self.replicates < 2:
            raise ValueError(f"width={self.width} needs replicates of 2 or more, got 1")
        if self.certain and (self.width or self.replicates <= FIRST):
            raise ValueError(
                f"certain={self.certain} stops choices after {FIRST} replicates or more, at most "
                f"``replicates``: give more, of few passes, as in passes=2,replicates=64, and no "
                f"width; got replicates={self.replicates}, width={self.width}"
            )
