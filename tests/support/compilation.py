"""Flags under which tests compile: quickly, since programs that run once need no optimisation."""

import importlib.metadata

FLAGS = ("--xla_backend_optimization_level=0",)
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Half the compile time; later versions may not know the flags, and unknown ones are fatal.
    FLAGS += ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
    FLAGS += ("--xla_llvm_disable_expensive_passes=true",)
