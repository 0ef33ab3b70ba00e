"""Sudoku with one solution, on grids up to 9 by 9."""

import dataclasses
import functools
from typing import Annotated, NamedTuple

from mdm_jax.checks import Whole, checked
from mdm_jax.tasks.task import Choices, Pair, Task, check_range

_ORDERS = 100  # of taking cells away, before a grid is given up


class _Groups(NamedTuple):
    """Rows, columns and boxes, numbered together."""

    of_cell: tuple[tuple[int, int, int], ...]  # for each cell, its three groups
    cells: tuple[tuple[int, ...], ...]  # for each group, its cells


@checked
@dataclasses.dataclass(frozen=True)
class Sudoku(Task):
    """n² digits, 0 for blank, to the n² digits of the only valid grid with these givens.

    n = ``rows`` times ``columns``, the shape of a box: 2 x 3 makes 6 x 6 grids. An instance is a
    full grid, found by a random depth-first search (every grid is possible, not all equally
    likely), so all puzzles of one grid are in one split. The number of blanks is uniform between
    two, but smaller where no such puzzle with one solution is found.
    """

    rows: Annotated[int, Whole("[1, 9]", "cells", "rows of a box")] = 2
    columns: Annotated[int, Whole("[1, 9]", "cells", "columns of a box")] = 2
    blanks: Annotated[
        tuple[int, int], Whole("[1, 73]", "cells", "fewest and most blank ones", several=True)
    ] = (6, 11)

    def __post_init__(self):
        check_range(self, size=(self.size, 2, 9))
        if len(self.blanks) != 2:
            raise ValueError(
                f"Sudoku: blanks must be the fewest and the most blank cells, got {self.blanks}"
            )
        low, high = self.blanks
        # All digits but one must be given somewhere, or two could be exchanged.
        most = self.size**2 - self.size + 1
        check_range(self, fewest_blanks=(low, 1, most), most_blanks=(high, low, most))

    @property
    def size(self) -> int:
        return self.rows * self.columns

    @property
    def lengths(self) -> tuple[int, int]:
        return self.size**2, self.size**2

    def draw(self, choices: Choices) -> str:
        groups = _groups(self.rows, self.columns)
        grid, used = [0] * self.size**2, [0] * len(groups.cells)
        digits = [1 << digit for digit in range(self.size)]

        def fill(cell: int) -> bool:
            if cell == len(grid):
                return True
            a, b, c = groups.of_cell[cell]
            taken = used[a] | used[b] | used[c]
            for bit in choices.shuffled([bit for bit in digits if not taken & bit]):
                _flip(used, groups.of_cell[cell], bit)
                grid[cell] = bit
                if fill(cell + 1):
                    return True
                _flip(used, groups.of_cell[cell], bit)
            return False

        fill(0)
        return "".join(str(bit.bit_length()) for bit in grid)

    def canonical(self, instance: str) -> str:
        return instance

    def write(self, instance: str, choices: Choices) -> Pair:
        low, high = self.blanks
        wanted = low + choices.below(high - low + 1)
        for _ in range(_ORDERS):
            order = choices.shuffled(range(len(instance)))
            blank = self._blank_cells(instance, order, wanted)
            if len(blank) >= low:
                cells = enumerate(instance)
                return Pair("".join("0" if i in blank else digit for i, digit in cells), instance)
        raise ValueError(
            f"Sudoku: found no puzzle with one solution and {low} blanks or more for the grid "
            f"{instance} in {_ORDERS} orders; lower blanks"
        )

    def _blank_cells(self, instance: str, order: list[int], wanted: int) -> set[int]:
        """Cells removed in this order as long as the solution stays unique."""
        groups = _groups(self.rows, self.columns)
        every_digit = (1 << self.size) - 1
        used, blank = [every_digit] * len(groups.cells), []
        for cell in order:
            if len(blank) == wanted:
                break
            bit = 1 << int(instance[cell]) - 1
            a, b, c = cell_groups = groups.of_cell[cell]
            _flip(used, cell_groups, bit)
            others = every_digit & ~(used[a] | used[b] | used[c] | bit)
            # The solution was unique; a second one must differ in this cell.
            if _try(blank, cell, others, used, groups, every_digit, limit=1):
                _flip(used, cell_groups, bit)
            else:
                blank.append(cell)
        return set(blank)

    def count_solutions(self, prompt: str, limit: int = 2) -> int:
        """Valid grids that keep the givens, at most ``limit``; ValueError if malformed."""
        groups = _groups(self.rows, self.columns)
        known = set("0123456789"[: self.size + 1])
        if len(prompt) != self.size**2 or not known.issuperset(prompt):
            raise ValueError(
                f"a prompt is {self.size**2} digits from 0 to {self.size}, got {prompt!r}"
            )
        used, blank = [0] * len(groups.cells), []
        for cell, digit in enumerate(prompt):
            if digit == "0":
                blank.append(cell)
                continue
            bit = 1 << int(digit) - 1
            if any(used[group] & bit for group in groups.of_cell[cell]):
                return 0
            _flip(used, groups.of_cell[cell], bit)
        return _count(blank, used, groups, (1 << self.size) - 1, limit)

    def check(self, prompt: str, answer: str) -> bool:
        digits = set("123456789"[: self.size])
        if len(answer) != len(prompt) or not digits.issuperset(answer):
            return False
        if any(given not in ("0", digit) for given, digit in zip(prompt, answer)):
            return False
        cells = _groups(self.rows, self.columns).cells
        return all({answer[cell] for cell in group} == digits for group in cells)


@functools.lru_cache(maxsize=16)
def _groups(rows: int, columns: int) -> _Groups:
    size = rows * columns
    of_cell = tuple(
        (r, size + c, 2 * size + r // rows * rows + c // columns)
        for r in range(size)
        for c in range(size)
    )
    cells = tuple(
        tuple(cell for cell, groups in enumerate(of_cell) if number in groups)
        for number in range(3 * size)
    )
    return _Groups(of_cell, cells)


def _flip(used: list[int], cell_groups: tuple[int, int, int], bit: int) -> None:
    """Add a digit to three groups or remove it; ``used`` holds a bit set for each group."""
    a, b, c = cell_groups
    used[a] ^= bit
    used[b] ^= bit
    used[c] ^= bit


def _try(
    blank: list[int],
    cell: int,
    bits: int,
    used: list[int],
    groups: _Groups,
    every_digit: int,
    limit: int,
) -> int:
    """Ways to fill the blank cells with one of ``bits`` in ``cell``, counted up to ``limit``."""
    solutions, cell_groups = 0, groups.of_cell[cell]
    while bits and solutions < limit:
        bit = bits & -bits
        bits ^= bit
        _flip(used, cell_groups, bit)
        solutions += _count(blank, used, groups, every_digit, limit - solutions)
        _flip(used, cell_groups, bit)
    return solutions


def _count(blank: list[int], used: list[int], groups: _Groups, every_digit: int, limit: int) -> int:
    """Ways to fill the blank cells, counted up to ``limit``; the tightest cell is tried first."""
    if not blank:
        return 1
    fewest, tightest, its_bits = every_digit.bit_length() + 1, -1, 0
    for number, cell in enumerate(blank):
        a, b, c = groups.of_cell[cell]
        bits = every_digit & ~(used[a] | used[b] | used[c])
        count = bits.bit_count()
        if count < fewest:
            fewest, tightest, its_bits = count, number, bits
            if count < 2:
                break
    rest = blank[:tightest] + blank[tightest + 1 :]
    return _try(rest, blank[tightest], its_bits, used, groups, every_digit, limit)
