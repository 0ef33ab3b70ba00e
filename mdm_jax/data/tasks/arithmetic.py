"""The three operators that tasks of arithmetic share."""

OPERATORS = "+-*"


def apply(operator: str, left: int, right: int) -> int:
    """``left operator right``."""
    if operator == "+":
        return left + right
    return left - right if operator == "-" else left * right


def commutes(operator: str) -> bool:
    """Whether the order of its operands does not matter."""
    return operator != "-"
