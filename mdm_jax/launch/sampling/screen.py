"""Text redrawn in place on a terminal; elsewhere each state of it is a line."""

import re
import shutil
import unicodedata
from typing import TextIO

_UP, _CLEAR = "\x1b[{}A", "\r\x1b[J"
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
RESET = "\x1b[0m"


class Screen:
    """Text in the making on a stream: on a terminal its last lines, as many as fit.

    Texts are drawn as they are: what a model wrote goes through ``data.printable`` first. Colours,
    ``\\x1b[32m`` up to :data:`RESET`, are for terminals alone.
    """

    def __init__(self, out: TextIO):
        self._out, self._rows, self._last = out, 0, ""

    @property
    def is_terminal(self) -> bool:
        return self._out.isatty()

    def draw(self, text: str) -> None:
        """Show ``text`` in place of the one before."""
        if self.is_terminal:
            size = shutil.get_terminal_size()
            lines = wrapped(text, size.columns)[-max(1, size.lines - 1) :]
            self.clear()
            self._out.write("\n".join(lines))
            self._rows = len(lines)
        elif text != self._last:
            self._out.write(text.replace("\n", "⏎") + "\n")
        self._last = text
        self._out.flush()

    def end(self, text: str) -> None:
        """Show the last ``text``, which stays."""
        self.clear()
        self._out.write(text + "\n")
        self._out.flush()
        self._last = ""

    def clear(self) -> None:
        """Remove the text from a terminal."""
        if self._rows:
            self._out.write((_UP.format(self._rows - 1) if self._rows > 1 else "") + _CLEAR)
        self._rows = 0


def wrapped(text: str, columns: int) -> list[str]:
    """Lines of a text as a terminal of that width breaks them; a colour goes on in the next."""
    lines, colour = [], ""
    for line in text.split("\n"):
        begun, used = colour, 0
        for piece in re.split(f"({_COLOUR.pattern})", line):
            if _COLOUR.fullmatch(piece):
                begun, colour = begun + piece, "" if piece == RESET else piece
                continue
            for character in piece:
                wide = 2 if unicodedata.east_asian_width(character) in "WF" else 1
                wide = 0 if unicodedata.combining(character) else wide
                if used + wide > columns - 1:  # the last column wraps here and there
                    lines.append(begun + RESET * bool(colour))
                    begun, used = colour, 0
                begun, used = begun + character, used + wide
        lines.append(begun + RESET * bool(colour))
    return lines
