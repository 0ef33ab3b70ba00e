"""Generation whose rows are shared by devices and processes."""

from collections.abc import Callable

import numpy as np

from mdm_jax.distributed import row_shards, spread_rows, to_host
from mdm_jax.types import Array, PyTree


def spread(generate: Callable[..., Array]) -> Callable[..., np.ndarray]:
    """``generate`` with the rows of a canvas on the devices that split batches.

    Returns ``run(params, key, canvas, documents=None, row_offset=0) -> tokens [B, L]`` on every
    host; parameters stay where they are. A row has the key of its number, wherever it is. The last
    one is repeated up to a multiple of the devices.
    """

    def run(
        params: PyTree,
        key: Array,
        canvas: np.ndarray,
        documents: np.ndarray | None = None,
        row_offset: int = 0,
    ) -> np.ndarray:
        count = len(canvas)
        rows = np.minimum(
            np.arange(-(-count // row_shards(params)) * row_shards(params)), count - 1
        )
        documents = None if documents is None else np.asarray(documents)[rows]
        own = np.asarray(canvas)[rows], documents, (rows + row_offset).astype(np.int32)
        return to_host(generate(params, key, *spread_rows(own, params)))[:count]

    return run
