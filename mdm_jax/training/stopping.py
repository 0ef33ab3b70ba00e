"""Early stopping by the interval of the validation bound's improvement, paired by row."""

import dataclasses
import statistics
from typing import Annotated, Any

import numpy as np

from mdm_jax.checks import Real, Whole, checked
from mdm_jax.estimates import Estimate, standard_error_of_ratio


@checked
@dataclasses.dataclass(frozen=True)
class StopSettings:
    """When training ends early: ``patience`` evaluations in a row without a possible gain."""

    patience: Annotated[
        int,
        Whole("[0, 1e6]", "evaluations", "in a row that rule out a gain, 3 or more; 0: never stop"),
    ] = 0
    min_gain: Annotated[
        float, Real("[0, 100]", "nats per token or dimension", "gain worth going on for")
    ] = 0.0
    coverage: Annotated[float, Real("(0, 1)", "", "of the interval of the gain")] = 0.95


class EarlyStopping:
    """Counts evaluations whose interval rules out a gain of more than ``min_gain``.

    Evaluations share rows and noise (one key), so the gain over the reference evaluation is a mean
    of paired differences by row, far more certain than either bound. An evaluation that rules out a
    larger gain, by the upper end of its interval, is counted; the reference stays, so that small
    gains add up. One that does not rule it out starts the count again and is the new reference if
    it is better. ``patience`` counted ones in a row end the training.

    ``state``: JSON values for the checkpoint's notes, which make a resumed run decide alike.
    """

    def __init__(self, settings: StopSettings, state: dict[str, Any] | None = None):
        self._settings = settings
        self.state = state or {"reference": None, "sizes": None, "step": None, "counted": 0}

    @property
    def stopped(self) -> bool:
        """Whether training is to end."""
        return 0 < self._settings.patience <= self.state["counted"]

    def observe(self, step: int, nats: np.ndarray, sizes: np.ndarray) -> Estimate | None:
        """Take an evaluation: bound [N] (nats) and elements [N] of each row.

        Returns the gain over the reference, nats per element, with its standard error over rows;
        None for the first, and for a bound that is not finite. ValueError if the rows are others
        than those of the reference.
        """
        before, gain = self.state, None
        nats, sizes = (np.asarray(each, np.float64) for each in (nats, sizes))
        if not np.all(np.isfinite(nats)):
            self.state = before | {"counted": 0}
            return None
        if before["reference"] is not None:
            if before["sizes"] != sizes.tolist():
                raise ValueError(
                    f"the evaluation of step {step} has other rows than that of step "
                    f"{before['step']}, so that their bounds cannot be paired; keep "
                    "evaluate.max_rows and the validation data as they were, or set "
                    "train.stop.patience=0"
                )
            gain = self._gain(nats, sizes)
            if self._largest(gain) <= self._settings.min_gain:
                self.state = before | {"counted": before["counted"] + 1}
                return gain
        self.state = before | {"counted": 0}
        if gain is None or gain.value > 0:
            self.state |= {"reference": nats.tolist(), "sizes": sizes.tolist(), "step": step}
        return gain

    def _gain(self, nats: np.ndarray, sizes: np.ndarray) -> Estimate:
        change = np.asarray(self.state["reference"]) - nats
        return Estimate(change.sum() / sizes.sum(), standard_error_of_ratio(change, sizes))

    def _largest(self, gain: Estimate) -> float:
        """Upper end of the gain's interval; NaN, which rules nothing out, for a single row."""
        reach = statistics.NormalDist().inv_cdf((1 + self._settings.coverage) / 2)
        return gain.value + reach * gain.standard_error

    def describe(self) -> str:
        """Why training ends, for the terminal."""
        s = self._settings
        return (
            f"stopped early: {self.state['counted']} evaluations in a row rule out (at "
            f"{s.coverage:.0%}) a gain of more than {s.min_gain:g} nats since step "
            f"{self.state['step']}"
        )
