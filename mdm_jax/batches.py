"""What a data pipeline hands to everything else."""

from typing import NamedTuple

from mdm_jax.typing import Array


class Batch(NamedTuple):
    """Clean examples. Fields are NumPy or JAX arrays; a single row has no leading axis.

    Attributes:
        tokens: [B, L] int32 clean token ids. Padding holds any valid id.
        eligible: [B, L] bool, positions that may be corrupted and are scored. Prompt and padding
            positions are never eligible.
        documents: [B, L] int32, 0 on padding; elements attend to each other only within the same
            positive number.
        units: [B] int32, how many units of measurement the eligible elements stand for: characters
            of the raw text, or pixels times channels.
    """

    tokens: Array
    eligible: Array
    documents: Array
    units: Array
