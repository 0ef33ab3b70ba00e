"""Checkpoints of one kind in a directory: a pytree and JSON records each, with a manifest."""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from mdm_jax import distributed
from mdm_jax.types import PyTree


class CheckpointError(RuntimeError):
    """No usable checkpoint, or one that does not fit the configuration."""


class StoreReader:
    """Reads a store and changes nothing, so that a trainer may be at work in it.

    Args:
        root: directory of all stores.
        name: of this one.
        item: what its pytrees are called.
    """

    def __init__(self, root: pathlib.Path, name: str, item: str):
        self.directory = root / name
        self._item = item
        self._manifests = root / "manifests" / name
        self._manager = self._open()

    def steps(self) -> list[int]:
        """What is there, ascending."""
        return sorted(self._manager.all_steps())

    def restore(self, abstract_tree: PyTree | None, records: tuple[str, ...]) -> dict | None:
        """Tree (if asked for) and records of the newest whole checkpoint, by item name.

        Raises:
            CheckpointError: if that one does not fit ``abstract_tree``.
        """
        tried = set()
        while left := [step for step in self.steps() if step not in tried]:
            step = left[-1]
            tried.add(step)
            problem = distributed.from_first(
                self._problem(step) if distributed.is_first() else None
            )
            if problem is None:
                try:
                    found = self._read(step, abstract_tree, records)
                    problem = self._meanwhile(step)
                    if problem is None:
                        return found
                except CheckpointError:
                    raise
                except Exception as error:
                    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                    problem = self._meanwhile(step)
                    if problem is None and self._manifest(step).exists():
                        # Every byte is as written, so it is the configuration that differs.
                        raise _misfit(self.directory / str(step), reason) from error
                    problem = problem or f"it cannot be read ({reason})"
            self._pass_over(step, problem)
        return None

    def read(self, step: int, abstract_tree: PyTree) -> PyTree:
        """The tree of a step, whose files are not checked."""
        return self._read(step, abstract_tree, ())[self._item]

    def as_saved(self, leaves: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
        """Leaves to ask for: of ``fields`` as given, of the others what the newest manifest has."""
        saved = self._saved_shapes()
        if saved is None:
            return leaves
        wanted = _shapes(leaves)
        sharding = next(iter(leaves.values())).sharding
        if isinstance(sharding, jax.sharding.NamedSharding):
            sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        asked = {name: leaf for name, leaf in leaves.items() if field_of(name) in fields}
        for name, form in saved.items():
            if field_of(name) in fields:
                continue
            if wanted.get(name) == form:
                asked[name] = leaves[name]
            else:
                dtype, bracket, shape = form.partition("[")
                shape = json.loads(bracket + shape)
                asked[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        return asked

    def close(self) -> None:
        """Releases the manager's threads."""
        self._manager.close()

    def _open(self) -> ocp.CheckpointManager:
        # Orbax's own read_only would say so on the terminal each time.
        options = ocp.CheckpointManagerOptions(create=False, enable_async_checkpointing=False)
        return ocp.CheckpointManager(self.directory, options=options)

    def _meanwhile(self, step: int) -> str | None:
        """What a trainer has removed while it was read."""
        problem = None
        if distributed.is_first():
            gone = not (self.directory / str(step)).exists()
            problem = "it was removed" if gone else self._problem(step, digests=False)
        return distributed.from_first(problem)

    def _pass_over(self, step: int, problem: str) -> None:
        self._manager.reload()
        if step in self.steps() and distributed.is_first():
            logging.warning(
                "checkpoint %s is damaged: %s. It stays where it is; trying another one, if any.",
                self.directory / str(step),
                problem,
            )

    def _read(self, step: int, abstract_tree: PyTree | None, records: tuple[str, ...]) -> dict:
        items = {name: ocp.args.JsonRestore() for name in records}
        if abstract_tree is not None:
            leaves = named_leaves(abstract_tree)
            self._check_fit(step, leaves)
            items[self._item] = ocp.args.StandardRestore(leaves)
        found = dict(self._manager.restore(step, args=ocp.args.Composite(**items)))
        if abstract_tree is not None:
            found[self._item] = jax.tree.unflatten(
                jax.tree.structure(abstract_tree), [found[self._item][name] for name in leaves]
            )
        if self._manifest(step).exists():
            amended = self._load_manifest(step).get("amended", {})
            found |= {name: amended[name] for name in records if name in amended}
        return found

    def _check_fit(self, step: int, leaves: dict[str, Any]) -> None:
        if not self._manifest(step).exists():
            return
        saved, wanted = self._load_manifest(step)["arrays"], _shapes(leaves)
        differing = [
            f"{name} is {saved.get(name, 'absent')}, wanted {wanted.get(name, 'absent')}"
            for name in sorted({*saved, *wanted})
            if saved.get(name) != wanted.get(name)
        ]
        if differing:
            more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise _misfit(self.directory / str(step), "; ".join(differing[:3]) + more)

    def _problem(self, step: int, digests: bool = True) -> str | None:
        path = self._manifest(step)
        if not path.exists():
            return None  # killed between the save and its manifest: let reading it decide
        try:
            expected = self._load_manifest(step)["files"]
            found = _files(self.directory / str(step), digests)
        except FileNotFoundError as error:
            return f"file {error.filename} is missing"
        except (ValueError, KeyError, TypeError):
            return f"its manifest {path} is damaged"
        for name, entry in expected.items():
            if name not in found:
                return f"file {name} is missing"
            if found[name]["size"] != entry["size"]:
                return f"file {name} has {found[name]['size']} bytes instead of {entry['size']}"
            if digests and found[name]["sha256"] != entry["sha256"]:
                return f"file {name} has changed since it was written"
        return None

    def _saved_shapes(self) -> dict[str, str] | None:
        """Of the newest checkpoint whose manifest can be read, None if there is none."""
        for step in reversed(self.steps()):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                return dict(self._load_manifest(step)["arrays"])
        return None

    def _manifest(self, step: int) -> pathlib.Path:
        return self._manifests / f"{step}.json"

    def _load_manifest(self, step: int) -> dict[str, Any]:
        return json.loads(self._manifest(step).read_text("utf-8"))


class Store(StoreReader):
    """Writes too, and sets aside what is damaged; one process or group of processes at a time.

    Args:
        root, name, item: as of :class:`StoreReader`; made if missing.
        keep: how many checkpoints.
    """

    def __init__(self, root: pathlib.Path, name: str, item: str, keep: int):
        self._keep = keep
        super().__init__(root, name, item)
        self._manifests.mkdir(parents=True, exist_ok=True)

    def save(
        self, step: int, tree: PyTree, records: dict[str, dict[str, Any]], force: bool = False
    ) -> bool:
        """Returns False, having done nothing, if the step is already there or a later one is.

        Args:
            step, tree, records: what to write.
            force: write it instead of later ones.
        """
        steps = self.steps()
        if step in steps or (not force and any(other > step for other in steps)):
            return False
        if distributed.is_first():
            self._manifest(step).unlink(missing_ok=True)
        leaves = named_leaves(tree)
        items = {self._item: ocp.args.StandardSave(leaves)}
        items |= {name: ocp.args.JsonSave(record) for name, record in records.items()}
        # Unforced, Orbax would not write below its latest step, and only say so by what it returns.
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        self._manager.wait_until_finished()
        distributed.barrier(f"saved {self.directory} {step}")
        if distributed.is_first():
            content = {"files": _files(self.directory / str(step)), "arrays": _shapes(leaves)}
            self._write_manifest(step, content)
            kept = {str(s) for s in self.steps()}
            for path in self._manifests.glob("*.json"):
                if path.stem not in kept:
                    path.unlink()
        return True

    def amend(self, step: int, records: dict[str, dict[str, Any]]) -> None:
        """From now on a step that is there has these records; nothing else of it is written."""
        if distributed.is_first() and self._manifest(step).exists():
            self._write_manifest(step, self._load_manifest(step) | {"amended": records})

    def _open(self) -> ocp.CheckpointManager:
        # Saving is synchronous: a kill then finds either the old or the new state, never neither,
        # and the manifest describes files that are all there.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep,
            enable_async_checkpointing=False,
            create=True,
            cleanup_tmp_directories=True,
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def _meanwhile(self, step: int) -> str | None:
        del step  # nobody else changes it
        return None

    def _pass_over(self, step: int, problem: str) -> None:
        source, number = self.directory / str(step), 0
        stem = f"damaged-{self.directory.name}-{step}"
        while (target := self.directory.parent / f"{stem}-{number}").exists():
            number += 1
        distributed.barrier(f"setting aside {source} as {number}")
        if distributed.is_first():
            source.rename(target)
            self._manifest(step).unlink(missing_ok=True)
        distributed.barrier(f"set aside {source} as {number}")
        self._manager.reload()
        if not distributed.is_first():
            return
        logging.warning(
            "checkpoint %s is damaged: %s. Moved it to %s; trying the one before, if any.",
            source,
            problem,
            target,
        )

    def _read(self, step: int, abstract_tree: PyTree | None, records: tuple[str, ...]) -> dict:
        found = super()._read(step, abstract_tree, records)
        missing = not self._manifest(step).exists()  # killed between the save and its manifest
        if abstract_tree is not None and missing and distributed.is_first():
            shapes = _shapes(named_leaves(abstract_tree))
            content = {"files": _files(self.directory / str(step)), "arrays": shapes}
            self._write_manifest(step, content)
        return found

    def _write_manifest(self, step: int, content: dict[str, Any]) -> None:
        temporary = self._manifest(step).with_suffix(".partial")
        temporary.write_text(json.dumps(content, indent=1), "utf-8")
        temporary.replace(self._manifest(step))


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by their path, such as "params/kernel"."""
    # Names instead of containers: files stay readable without the classes that made them.
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def field_of(name: str) -> str:
    """The outermost part of a leaf's name."""
    return name.split("/")[0]


def _shapes(leaves: dict[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def _misfit(path: pathlib.Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path} is whole but does not fit this configuration (another model, "
        f"optimizer or variance chain?): {reason}"
    )


def _files(directory: pathlib.Path, digests: bool = True) -> dict[str, dict[str, Any]]:
    manifest = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = path.relative_to(directory).as_posix()
        manifest[name] = {"size": path.stat().st_size}
        if digests:
            with path.open("rb") as file:
                manifest[name]["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return manifest
