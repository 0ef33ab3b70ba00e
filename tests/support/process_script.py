"""One process of several: what it draws, reads, scores and agrees on, as JSON of process 0."""

import hashlib
import json
import sys

import jax

if __name__ == "__main__":
    address, count, number = sys.argv[1:4]
    if int(count) > 1:
        jax.distributed.initialize(address, int(count), int(number))

import numpy as np  # noqa: E402
import optax  # noqa: E402
import tiny  # noqa: E402

from mdm_jax import data, distributed, likelihood, sharding, training  # noqa: E402
from mdm_jax.data.rows import StoredRows  # noqa: E402

ROWS = 8


def digest(tree) -> str:
    """Of every bit of a pytree."""
    leaves = jax.tree.leaves(distributed.to_host(tree))
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()


def read(mesh, steps: int = 3):
    """Global batches, placed."""
    rows_over = sharding.batch_sharding(mesh)
    source = StoredRows(tiny.batch(50, seed=4))
    rows = sharding.local_rows(rows_over, ROWS)
    iterator = data.train_iterator(source, ROWS, seed=5, rows=rows)
    return [sharding.place_batch(next(iterator), rows_over, ROWS) for _ in range(steps)]


def observe() -> dict:
    """Draws, rows, steps and an evaluation, rows over all devices."""
    mesh = sharding.make_mesh()
    spec, step = tiny.step_fn(ROWS, optax.adam(0.01), ema_decay=0.9)
    state = sharding.replicate(tiny.new_state(spec, optax.adam(0.01)), mesh)
    batches, step = read(mesh), tiny.jit(step)
    drawn = tiny.jit(
        lambda number, v: training.step_draw(3, number, tiny.transform(), v, spec),
        out_shardings=None,
    )(jax.numpy.int32(1), state.variance)
    losses = []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    evaluate = likelihood.make_likelihood(tiny.apply_fn, tiny.MASK_ID, passes=2, replicates=2)
    source = StoredRows(tiny.batch(13, seed=6))
    found = evaluate(state.ema, jax.random.key(0), data.evaluation_batches(source, 8))
    return {
        "draw": digest(drawn),
        "rows": digest(batches),
        "losses": losses,
        "parameters": float(optax.tree.norm(state.params)),
        "evaluation": float(np.mean(found.replicate_row_nats)),
        "row_index": found.row_index.tolist(),
    }


def main() -> None:
    """Prints what process 0 saw."""
    me, several = jax.process_index(), jax.process_count()
    stop = training.Interrupt()
    stop.requested = me == several - 1
    before = stop.stopping
    stop.agree()
    record = {
        "found": observe(),
        "rows_of_all": digest(read(sharding.make_mesh(tensor=jax.device_count()))),
        "first": distributed.from_first({"of": me}),
        "any": [distributed.any_of(me == several - 1), distributed.any_of(False)],
        "stopping": [before, stop.stopping],
        "local": len(sharding.local_rows(sharding.batch_sharding(sharding.make_mesh()), ROWS)),
    }
    distributed.barrier("end")
    if distributed.is_first():
        print(json.dumps(record))


if __name__ == "__main__":
    main()
