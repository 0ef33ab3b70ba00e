"""How tests compile: quickly, since programs that run once need no optimisation."""

import importlib.metadata
import itertools
import threading

FLAGS = ("--xla_backend_optimization_level=0",)
KNOWN = importlib.metadata.version("jaxlib").startswith("0.10.")
if KNOWN:
    # Half the compile time; later versions may not know the flags, and unknown ones are fatal.
    FLAGS += ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
    FLAGS += ("--xla_llvm_disable_expensive_passes=true",)


def share_contexts() -> None:
    """A hundred programs of a thread are lowered in one MLIR context, not each in its own.

    To make a context takes 4 of the 16 ms of a small program, of which the suite has 8,000. A
    program lowered within another one gets its own, or it would be written into the other. An
    internal function of JAX, so versions not tried are left alone.
    """
    if not KNOWN:
        return
    from jax._src.interpreters import mlir

    make, own = mlir.make_ir_context, threading.local()

    def within_another() -> bool:
        try:
            return mlir.ir.Context.current is not None
        except ValueError:
            return False

    def context():
        if within_another():
            return make()
        if next(own.__dict__.setdefault("programs", itertools.count())) % 100 == 0:
            own.context = make()
        return own.context

    mlir.make_ir_context = context
