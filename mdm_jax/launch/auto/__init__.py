"""The variance chain of a run: configured, or measured and chosen (``variance.order=auto``)."""
