"""The step compiled ahead of time: it cannot be compiled again unnoticed."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from mdm_jax.training.memory import format_bytes
from mdm_jax.typing import Array, PyTree


class CompiledStep(NamedTuple):
    """A compiled step and what is known of it.

    Attributes:
        call: ``call(state, batch) -> (state, metrics)``; TypeError or ValueError for arguments of
            other shapes, dtypes or placements than those it was compiled for.
        seconds: of tracing, lowering and compiling, or of loading from the cache.
        memory_bytes: on each device while it runs, arguments included; None where the backend does
            not say.
    """

    call: Callable[..., Any]
    seconds: float
    memory_bytes: int | None

    def describe(self) -> str:
        """One line for people."""
        known = self.memory_bytes is not None
        memory = f", {format_bytes(self.memory_bytes)} per device" if known else ""
        return f"step compiled in {self.seconds:.1f} s{memory}"


def compile_step(
    step: Callable[..., Any], abstract_state: PyTree, abstract_batch: PyTree, *constants: Array
) -> CompiledStep:
    """Compiles a train step, its state donated and placed as it was.

    Args:
        step: pure step function.
        abstract_state, abstract_batch: pytrees of jax.ShapeDtypeStruct with shardings.
        constants: placed arrays, further arguments of the step. They are no part of the program, so
            runs that differ in them alone, in the seed say, find each other's in the cache.
    """
    started = time.monotonic()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    compiled = jitted.lower(abstract_state, abstract_batch, *constants).compile()

    def call(state: PyTree, batch: PyTree) -> Any:
        return compiled(state, batch, *constants)

    seconds = time.monotonic() - started
    return CompiledStep(call if constants else compiled, seconds, _memory(compiled))


def _memory(compiled: Any) -> int | None:
    found = compiled.memory_analysis()
    if found is None:
        return None
    kept = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + kept + found.temp_size_in_bytes
