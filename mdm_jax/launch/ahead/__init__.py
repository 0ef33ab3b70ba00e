"""Compilation of a run for accelerators that need not be there (``mdm compile``)."""
