"""One series of checkpoints: Orbax arrays, written beside the next steps, under manifests."""

import collections
import contextlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from mdm_jax import distributed, files
from mdm_jax.training import manifests
from mdm_jax.training.manifests import DamagedError
from mdm_jax.types import PyTree

_RECORDS = 2**20
"""Bytes left for what is not an array: records, indices, manifests, metrics."""


class CheckpointError(RuntimeError):
    """No usable checkpoint, or one that does not fit the configuration."""


class _Manager(ocp.CheckpointManager):
    def metrics(self, step: int) -> None:
        """Nothing: read from all checkpoints at opening, one damaged file would end every mode."""


class Background:
    """Functions called one after another in one thread; their errors are raised by ``wait``."""

    def __init__(self):
        self._executor = ThreadPoolExecutor(1, "checkpoints")
        self._pending: collections.deque[Future] = collections.deque()

    def add(self, function: Callable[..., None], *arguments: Any) -> None:
        self._pending.append(self._executor.submit(function, *arguments))

    def wait(self, unfinished: bool = True) -> None:
        """Until all are done (else, without ``unfinished``, not at all); raises the first error."""
        while self._pending and (unfinished or self._pending[0].done()):
            self._pending.popleft().result()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._executor.shutdown()


class Store:
    """The checkpoints ``name`` below ``root``, of pytrees saved as ``item``.

    ``keep``, the largest number of checkpoints, is for the one trainer, who writes in the
    ``background`` and sets damaged ones aside. Without them nothing is changed, and a trainer may
    be at work.
    """

    def __init__(
        self,
        root: files.Path,
        name: str,
        item: str,
        keep: int | None = None,
        background: Background | None = None,
    ):
        self.directory = root / name
        self._item, self._keep, self._writable = item, keep, keep is not None
        self._background = background
        self._manifests = root / "manifests" / name
        if self._writable:
            self._manifests.mkdir(parents=True, exist_ok=True)
            self.directory.mkdir(parents=True, exist_ok=True)
        # Named processes meet at the coordination service: Orbax's threads must not run collectives
        # on the devices beside those of a step. Its read_only would print a warning each time.
        several = jax.process_count() > 1
        options = ocp.CheckpointManagerOptions(
            enable_async_checkpointing=self._writable,
            create=False,
            cleanup_tmp_directories=self._writable,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                active_processes=set(range(jax.process_count())) if several else None,
                barrier_sync_key_prefix=name,
            ),
        )
        self._manager = _Manager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Steps of the checkpoints, ascending, one that is being written included."""
        return sorted(self._manager.all_steps())

    def restore(self, abstract_tree: PyTree | None, records: tuple[str, ...]) -> dict | None:
        """Tree and records of the newest intact checkpoint; CheckpointError if it does not fit."""
        if self._background is not None:
            self._background.wait()
        tried = set()
        while remaining := [step for step in self.steps() if step not in tried]:
            step = remaining[-1]
            tried.add(step)
            problem, manifest = self._verify(step)
            if problem is None:
                try:
                    items = self._read(step, abstract_tree, records, manifest)
                    problem = self._meanwhile(step)
                    if problem is None:
                        return items
                except CheckpointError:
                    raise
                except Exception as error:
                    problem = self._meanwhile(step)
                    if problem is None:
                        # Every byte is as written, so it is the configuration that differs.
                        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                        raise _misfit(self.directory / str(step), reason) from error
            self._pass_over(step, problem)
        return None

    def read(self, step: int, abstract_tree: PyTree) -> PyTree:
        """The tree of a step, without checking its files."""
        try:
            manifest = self.manifest(step)
        except DamagedError:
            manifest = None
        return self._read(step, abstract_tree, (), manifest)[self._item]

    def as_saved(self, leaves: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
        """Abstract leaves to restore: ``fields`` as given, others as in the newest manifest."""
        saved = self._saved_shapes()
        if saved is None:
            return leaves
        sharding = next(iter(leaves.values())).sharding
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
        wanted = shapes_of(leaves)
        result = {name: leaf for name, leaf in leaves.items() if field_of(name) in fields}
        for name, form in saved.items():
            if field_of(name) in fields:
                continue
            if wanted.get(name) == form:
                result[name] = leaves[name]
            else:
                dtype, bracket, shape = form.partition("[")
                shape = json.loads(bracket + shape)
                result[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        return result

    def save(
        self,
        step: int,
        tree: PyTree,
        records: dict[str, dict[str, Any]],
        force: bool = False,
        then: Callable[[], None] | None = None,
    ) -> bool:
        """Begin a checkpoint; False if the step (or, unless ``force``, a later one) exists.

        Waits for saves before it, and for copies of the arrays on the host: ``tree`` may be donated
        afterwards. The files follow in the background; then process 0 calls ``then``.
        """
        steps = self.steps()
        if step in steps or (not force and any(other > step for other in steps)):
            return False
        self._background.wait()
        before, leaves = self.steps(), named_leaves(tree)
        self._check_space(self.directory / str(step), leaves)
        if distributed.is_first():
            self._manifest_path(step).unlink(missing_ok=True)
        items = {self._item: ocp.args.StandardSave(leaves)}
        records = json.loads(json.dumps(records))  # the caller may change them
        items |= {name: ocp.args.JsonSave(record) for name, record in records.items()}
        # Unforced, Orbax skips steps below its latest one and only returns False.
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        self._background.add(self._complete, step, shapes_of(leaves), before, then)
        return True

    def _complete(
        self,
        step: int,
        arrays: dict[str, str],
        before: list[int],
        then: Callable[[], None] | None,
    ) -> None:
        """Wait for the files, describe them, each process its own, and delete what is too much."""
        self._manager.wait_until_finished()
        path = self.directory / str(step)
        own = manifests.written_by(jax.process_index(), manifests.names_in(path))
        found = distributed.collect(f"files of {path}", manifests.digests(path, own))
        if distributed.is_first():
            entries = {name: entry for part in found for name, entry in part.items()}
            self._describe(step, {"files": entries, "arrays": arrays})
            if then is not None:
                then()
        # Not before the new one has its manifest, and not by Orbax, which would be too early.
        distributed.meet(f"described {path}")
        for old in before[: max(0, len(before) + 1 - self._keep)]:
            self._manager.delete(old)
        if distributed.is_first():
            kept = {str(s) for s in self.steps()}
            for manifest in self._manifests.glob("*.json"):
                if manifest.stem not in kept:
                    manifest.unlink()

    def _describe(self, step: int, content: dict[str, Any]) -> None:
        manifests.write(self._manifest_path(step), content)

    def _check_space(self, path: files.Path, leaves: dict[str, Any]) -> None:
        """Raise CheckpointError on a full disk, where Orbax fails late and with many tracebacks."""
        needed, free = _RECORDS + sum(leaf.nbytes for leaf in leaves.values()), math.inf
        with contextlib.suppress(OSError):  # no disk, such as a bucket
            free = shutil.disk_usage(self.directory).free
        if distributed.from_first(free) < needed:
            raise CheckpointError(
                f"{path} cannot be written: it takes {needed / 2**20:,.1f} MiB and the disk has "
                f"{free / 2**20:,.1f} MiB left; free some and run the same command again"
            )

    def amend(self, step: int, records: dict[str, dict[str, Any]]) -> None:
        """Replace records of a checkpoint, behind what is being written; a small file."""
        if distributed.is_first():
            records = json.loads(json.dumps(records))  # the caller may change them
            self._background.add(self._amend, step, records)

    def _amend(self, step: int, records: dict[str, dict[str, Any]]) -> None:
        if self._manifest_path(step).exists():
            with contextlib.suppress(DamagedError):  # named when it is restored
                self._describe(step, self.manifest(step) | {"amended": records})

    def close(self) -> None:
        self._manager.close()

    def _meanwhile(self, step: int) -> str | None:
        """What a trainer removed during the reading."""
        if self._writable:
            return None  # there is no other writer
        problem = None
        if distributed.is_first():
            removed = not (self.directory / str(step)).exists()
            problem = "it was removed" if removed else self._inspect(step)[0]
        return distributed.from_first(problem)

    def _pass_over(self, step: int, problem: str) -> None:
        source = self.directory / str(step)
        if self._writable:
            number, stem = 0, f"damaged-{self.directory.name}-{step}"
            while (target := self.directory.parent / f"{stem}-{number}").exists():
                number += 1
            distributed.barrier(f"setting aside {source} as {number}")
            if distributed.is_first():
                source.rename(target)
                self._manifest_path(step).unlink(missing_ok=True)
            distributed.barrier(f"set aside {source} as {number}")
            outcome = f"Moved it to {target}; trying the one before, if any."
        else:
            outcome = "It stays where it is; trying another one, if any."
        self._manager.reload()
        if distributed.is_first() and (self._writable or step in self.steps()):
            logging.warning("checkpoint %s is damaged: %s. %s", source, problem, outcome)

    def _read(
        self, step: int, tree: PyTree | None, records: tuple[str, ...], manifest: dict | None
    ) -> dict[str, Any]:
        if callable(tree):
            tree = tree(self._read(step, None, records, manifest))
        items = {name: ocp.args.JsonRestore() for name in records}
        if tree is not None:
            leaves = named_leaves(tree)
            if manifest is not None:
                self._check_fit(step, leaves, manifest["arrays"])
            items[self._item] = ocp.args.StandardRestore(leaves)
        restored = dict(self._manager.restore(step, args=ocp.args.Composite(**items)))
        if tree is not None:
            values = [restored[self._item][name] for name in leaves]
            restored[self._item] = jax.tree.unflatten(jax.tree.structure(tree), values)
        amended = (manifest or {}).get("amended", {})
        return restored | {name: amended[name] for name in records if name in amended}

    def _check_fit(self, step: int, leaves: dict[str, Any], saved: dict[str, str]) -> None:
        wanted = shapes_of(leaves)
        differing = [
            f"{name} is {saved.get(name, 'absent')}, wanted {wanted.get(name, 'absent')}"
            for name in sorted({*saved, *wanted})
            if saved.get(name) != wanted.get(name)
        ]
        if differing:
            more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise _misfit(self.directory / str(step), "; ".join(differing[:3]) + more)

    def _verify(self, step: int) -> tuple[str | None, dict[str, Any] | None]:
        """(what is damaged or None, the manifest); every byte is read, by one of the processes."""
        problem, manifest = distributed.from_first(
            self._inspect(step) if distributed.is_first() else None
        )
        if problem is None:
            me, several = jax.process_index(), jax.process_count()
            own = manifests.share_of(me, several, manifest["files"])
            found = distributed.from_all(
                _problem(manifests.check_digests, self.directory / str(step), own)
            )
            problem = next(filter(None, found), None)
        return problem, manifest

    def _inspect(self, step: int) -> tuple[str | None, dict[str, Any] | None]:
        """As :meth:`_verify`, without reading the files."""
        try:
            manifest = self.manifest(step)
        except DamagedError as error:
            return str(error), None
        path = self.directory / str(step)
        return _problem(manifests.check_sizes, path, manifest["files"]), manifest

    def _saved_shapes(self) -> dict[str, str] | None:
        for step in reversed(self.steps()):
            with contextlib.suppress(DamagedError):
                return self.manifest(step)["arrays"]
        return None

    def _manifest_path(self, step: int) -> files.Path:
        return self._manifests / f"{step}.json"

    def manifest(self, step: int) -> dict[str, Any]:
        """As of ``manifests.read``."""
        return manifests.read(self._manifest_path(step))


def _problem(check: Callable[..., None], path: files.Path, entries: dict[str, dict]) -> str | None:
    """The damage that a check finds."""
    try:
        check(path, entries)
    except DamagedError as error:
        return str(error)
    except FileNotFoundError as error:
        return f"file {error.filename} is missing"
    return None


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by path, such as "params/kernel", readable without the state's classes."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def field_of(name: str) -> str:
    """The outermost part of a leaf's name."""
    return name.split("/")[0]


def shapes_of(leaves: dict[str, Any]) -> dict[str, str]:
    """Dtype and shape of leaves, as manifests have them: "float32[3, 4]"."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def _misfit(path: files.Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path} is whole but does not fit this configuration (another model, "
        f"optimizer or variance chain?): {reason}"
    )
