"""One process of several: what it draws, reads, scores, saves and agrees on, as JSON."""

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

from mdm_jax import data, distributed, files, likelihood, samplers, sharding, training  # noqa: E402
from mdm_jax.data.rows import StoredRows  # noqa: E402
from mdm_jax.launch.sampling.spread import spread  # noqa: E402

ROWS = 8


class Counted:
    """Rows of another source, and how many were read."""

    def __init__(self, source):
        self._source, self.read = source, 0

    def __len__(self):
        return len(self._source)

    def rows(self, indices):
        self.read += len(indices)
        return self._source.rows(indices)


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
    source = Counted(StoredRows(tiny.batch(13, seed=6)))
    held_out = data.evaluation_batches(source, 8, read=data.gather_together)
    found = evaluate(state.ema, jax.random.key(0), held_out)
    generate = spread(
        samplers.make_generator(tiny.apply_fn, samplers.first_hitting(), None, mask_id=tiny.MASK_ID)
    )
    canvas = np.full((5, tiny.LENGTH), tiny.MASK_ID, np.int32)
    canvas[:, 0] = np.arange(5) % tiny.MASK_ID
    generated = generate(state.ema, jax.random.key(7), canvas, np.ones_like(canvas), 3)
    return {
        "draw": digest(drawn),
        "rows": digest(batches),
        "losses": losses,
        "parameters": float(optax.tree.norm(state.params)),
        "evaluation": float(np.mean(found.replicate_row_nats)),
        "row_index": found.row_index.tolist(),
        "generated": generated.tolist(),
        "rows_read": source.read,
    }


def shards(mesh) -> dict:
    """A state of which every device holds a part, and its step."""
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    kernel = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    kernel = jax.make_array_from_callback(kernel.shape, split, lambda index: kernel[index])
    return {"kernel": kernel, "step": sharding.replicate(np.int32(4), mesh)}


def save(directory) -> dict:
    """Save states while steps go on, and what comes back; the newest one was damaged since."""
    state = shards(sharding.make_mesh(data=1, fsdp=jax.device_count()))
    shapes = training.abstract(state)
    step = tiny.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    checkpoints = training.Checkpoints(directory, keep_last=2)
    for number in (4, 8, 12):
        checkpoints.save(number, state, {}, {"of": number})
        state = step(state)
        distributed.any_of(False)  # collectives of the main thread meanwhile
        if number == 4:
            checkpoints.save_best(number, state, {"loss": 1.0})
    checkpoints.close()
    distributed.barrier("saved")
    manifest = files.read_json(checkpoints.directory / "manifests/last/12.json")
    if distributed.is_first():
        name = max(manifest["files"], key=lambda name: ("process_1/" in name, "/d/" in name))
        path = checkpoints.directory / "last/12" / name
        path.write_bytes(bytes(files.size(path)))
    distributed.barrier("damaged")
    again = training.Checkpoints(directory)
    found = again.restore_last(shapes)
    again.close()
    return {
        "notes": found.notes,
        "kernel": digest({"kernel": found.state["kernel"]}),
        "owners": sorted({n.split("/")[1] for n in manifest["files"] if "ocdbt.process" in n}),
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
        "saved": save(sys.argv[4]),
        "local": len(sharding.local_rows(sharding.batch_sharding(sharding.make_mesh()), ROWS)),
    }
    distributed.barrier("end")
    if distributed.is_first():
        print(json.dumps(record))


if __name__ == "__main__":
    main()
