"""One process of several: loads a model onto a mesh over all, saves it, prints its logits."""

import json
import sys

import jax

if __name__ == "__main__":
    address, count, number, source, target = sys.argv[1:6]
    jax.distributed.initialize(address, int(count), int(number))

import numpy as np  # noqa: E402

from mdm_jax import distributed, hub, sharding  # noqa: E402
from mdm_jax.hub import files  # noqa: E402


def main() -> None:
    """Process 0 prints logits, and the numbers of split arrays and of files."""
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    model = hub.load(source, dtype="float32", mesh=mesh)
    ids = np.arange(1, 9).reshape(1, 8)
    logits = distributed.to_host(model.logits(ids))
    split = sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(model.params))
    written = hub.save(target, model, max_shard_size=30_000)
    # Every process finds what it returns.
    shards = len(set(files.TensorFiles(written).file_of.values()))
    distributed.barrier("end")
    if distributed.is_first():
        print(json.dumps({"logits": logits.tolist(), "split": split, "shards": shards}))


if __name__ == "__main__":
    main()
