"""Checks of answers whose result stands after a marker, as after ``####`` in GSM8K."""

import dataclasses
import decimal
from collections.abc import Mapping


def result_after(answer: str, marker: str) -> str | None:
    """What stands after the last ``marker``, or None without one.

    Numbers are brought to one form: ``$1,000``, ``1000.0`` and ``1000.`` are all ``1000``, and
    other texts lose the spaces around them.
    """
    _, found, text = answer.rpartition(marker)
    if not found:
        return None
    text = text.strip()
    try:
        number = decimal.Decimal(text.removeprefix("$").replace(",", "").rstrip("."))
    except decimal.InvalidOperation:
        return text
    return format(number.normalize(), "f") if number.is_finite() else text


@dataclasses.dataclass(frozen=True)
class ResultAfterMarker:
    """Whether an answer ends in the result of one of the prompt's reference answers.

    Attributes:
        marker: text before the result.
        results: of the reference answers, by prompt.
    """

    marker: str
    results: Mapping[str, frozenset[str]]

    def __call__(self, prompt: str, answer: str) -> bool:
        """As ``Dataset.check``.

        Raises:
            ValueError: for a prompt without a reference.
        """
        if prompt not in self.results:
            raise ValueError(f"no reference answer to the prompt {prompt!r}")
        return result_after(answer, self.marker) in self.results[prompt]
