"""Checkpoints of one kind in a directory: a pytree and JSON records each, with a manifest.

A layer over Orbax's CheckpointManager that adds SHA-256 sums of all files, and falling back past a
damaged checkpoint, naming it.
"""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from mdm_jax import distributed
from mdm_jax.types import PyTree


class CheckpointError(RuntimeError):
    """No usable checkpoint, or one that does not fit the configuration."""


class Store:
    """The store ``name`` below ``root``, whose pytrees are called ``item``.

    With ``keep``, the largest number of checkpoints, it is that of the one trainer, who writes and
    sets damaged checkpoints aside. Without, nothing is changed, and a trainer may be at work.
    """

    def __init__(self, root: pathlib.Path, name: str, item: str, keep: int | None = None):
        self.directory = root / name
        self._item, self._writable = item, keep is not None
        self._manifests = root / "manifests" / name
        if self._writable:
            self._manifests.mkdir(parents=True, exist_ok=True)
        # Saving is synchronous: a kill then leaves the old or the new state, and the manifest
        # describes files that are all there. Orbax's read_only would print a warning each time.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=False,
            create=self._writable,
            cleanup_tmp_directories=self._writable,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Steps of the checkpoints at hand, ascending."""
        return sorted(self._manager.all_steps())

    def restore(self, abstract_tree: PyTree | None, records: tuple[str, ...]) -> dict | None:
        """Tree (unless None) and records of the newest intact checkpoint, by item name.

        Raises:
            CheckpointError: if that one does not fit ``abstract_tree``.
        """
        tried = set()
        while remaining := [step for step in self.steps() if step not in tried]:
            step = remaining[-1]
            tried.add(step)
            problem = distributed.from_first(
                self._problem(step) if distributed.is_first() else None
            )
            if problem is None:
                try:
                    items = self._read(step, abstract_tree, records)
                    problem = self._meanwhile(step)
                    if problem is None:
                        return items
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
        """The tree of a step, without checking its files."""
        return self._read(step, abstract_tree, ())[self._item]

    def as_saved(self, leaves: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
        """Abstract leaves to restore: ``fields`` as given, others as the newest manifest says."""
        saved = self._saved_shapes()
        if saved is None:
            return leaves
        sharding = next(iter(leaves.values())).sharding
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
        wanted = _shapes(leaves)
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
        self, step: int, tree: PyTree, records: dict[str, dict[str, Any]], force: bool = False
    ) -> bool:
        """Writes a checkpoint; returns False, having done nothing, if the step is there already.

        Also if a later one is there, unless ``force``.
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
            self._write_manifest(step, self._describe(step, leaves))
            kept = {str(s) for s in self.steps()}
            for path in self._manifests.glob("*.json"):
                if path.stem not in kept:
                    path.unlink()
        return True

    def amend(self, step: int, records: dict[str, dict[str, Any]]) -> None:
        """Replaces records of a checkpoint; only its manifest is written."""
        if distributed.is_first() and self._manifest(step).exists():
            self._write_manifest(step, self._load_manifest(step) | {"amended": records})

    def close(self) -> None:
        """Releases the manager's threads."""
        self._manager.close()

    def _meanwhile(self, step: int) -> str | None:
        """What a trainer removed during the reading."""
        if self._writable:
            return None  # there is no other writer
        problem = None
        if distributed.is_first():
            removed = not (self.directory / str(step)).exists()
            problem = "it was removed" if removed else self._problem(step, digests=False)
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
                self._manifest(step).unlink(missing_ok=True)
            distributed.barrier(f"set aside {source} as {number}")
            outcome = f"Moved it to {target}; trying the one before, if any."
        else:
            outcome = "It stays where it is; trying another one, if any."
        self._manager.reload()
        if distributed.is_first() and (self._writable or step in self.steps()):
            logging.warning("checkpoint %s is damaged: %s. %s", source, problem, outcome)

    def _read(self, step: int, abstract_tree: PyTree | None, records: tuple[str, ...]) -> dict:
        items = {name: ocp.args.JsonRestore() for name in records}
        if abstract_tree is not None:
            leaves = named_leaves(abstract_tree)
            self._check_fit(step, leaves)
            items[self._item] = ocp.args.StandardRestore(leaves)
        restored = dict(self._manager.restore(step, args=ocp.args.Composite(**items)))
        if abstract_tree is not None:
            values = [restored[self._item][name] for name in leaves]
            restored[self._item] = jax.tree.unflatten(jax.tree.structure(abstract_tree), values)
        if self._manifest(step).exists():
            amended = self._load_manifest(step).get("amended", {})
            restored |= {name: amended[name] for name in records if name in amended}
        elif self._writable and abstract_tree is not None and distributed.is_first():
            self._write_manifest(step, self._describe(step, leaves))  # killed before it could be
        return restored

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
            files = _files(self.directory / str(step), digests)
        except FileNotFoundError as error:
            return f"file {error.filename} is missing"
        except (ValueError, KeyError, TypeError):
            return f"its manifest {path} is damaged"
        for name, entry in expected.items():
            if name not in files:
                return f"file {name} is missing"
            if files[name]["size"] != entry["size"]:
                return f"file {name} has {files[name]['size']} bytes instead of {entry['size']}"
            if digests and files[name]["sha256"] != entry["sha256"]:
                return f"file {name} has changed since it was written"
        return None

    def _saved_shapes(self) -> dict[str, str] | None:
        for step in reversed(self.steps()):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                return dict(self._load_manifest(step)["arrays"])
        return None

    def _manifest(self, step: int) -> pathlib.Path:
        return self._manifests / f"{step}.json"

    def _load_manifest(self, step: int) -> dict[str, Any]:
        return json.loads(self._manifest(step).read_text("utf-8"))

    def _describe(self, step: int, leaves: dict[str, Any]) -> dict[str, Any]:
        return {"files": _files(self.directory / str(step)), "arrays": _shapes(leaves)}

    def _write_manifest(self, step: int, content: dict[str, Any]) -> None:
        temporary = self._manifest(step).with_suffix(".partial")
        temporary.write_text(json.dumps(content, indent=1), "utf-8")
        temporary.replace(self._manifest(step))


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by path, such as "params/kernel": files stay readable without the state's classes."""
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
