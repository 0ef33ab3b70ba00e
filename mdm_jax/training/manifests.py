"""Manifests of checkpoints: what was written, to tell whether it still is.

A JSON file per checkpoint: ``files``, name -> {size, sha256}; ``arrays``, name -> dtype and shape;
``amended`` records, if any; ``sha256``, of all the rest (absent in those of earlier releases).
"""

import hashlib
import json
import re
from collections.abc import Collection
from typing import Any

from mdm_jax import files


class DamagedError(Exception):
    """A checkpoint is not as it was written; the message says in what."""


def digests(directory: files.Path, names: Collection[str]) -> dict[str, dict[str, Any]]:
    """Sizes and SHA-256 of files below a directory."""
    entries = {}
    for name in names:
        with (directory / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entries[name] = {"size": files.size(directory / name), "sha256": digest}
    return entries


def names_in(directory: files.Path) -> list[str]:
    """Names of all files below a directory."""
    return [path.relative_to(directory).as_posix() for path in files.below(directory)]


def written_by(process: int, names: Collection[str]) -> list[str]:
    """Those of a process among the files that Orbax writes; process 0 has what all share."""
    owners = {name: re.search(r"(?:^|[/.])process_(\d+)(?:/|$)", name) for name in names}
    return [name for name, found in owners.items() if int(found[1] if found else 0) == process]


def share_of(process: int, processes: int, entries: dict[str, dict]) -> dict[str, dict]:
    """The files that a process compares: of all sizes about as much as the others."""
    ordered = sorted(entries, key=lambda name: (-entries[name]["size"], name))
    return {name: entries[name] for name in ordered[process::processes]}


def check_sizes(directory: files.Path, entries: dict[str, dict]) -> None:
    """Raise DamagedError for a missing file, or one of another size."""
    found = set(names_in(directory))
    for name, entry in entries.items():
        if name not in found:
            raise DamagedError(f"file {name} is missing")
        if (size := files.size(directory / name)) != entry["size"]:
            raise DamagedError(f"file {name} has {size} bytes instead of {entry['size']}")


def check_digests(directory: files.Path, entries: dict[str, dict]) -> None:
    """Raise DamagedError for a file of another content; reads every byte."""
    for name, entry in entries.items():
        if digests(directory, [name])[name]["sha256"] != entry["sha256"]:
            raise DamagedError(f"file {name} has changed since it was written")


def read(path: files.Path) -> dict[str, Any]:
    """The content of a manifest; DamagedError if it is missing or not what was written."""
    try:
        content = files.read_json(path)
    except FileNotFoundError:
        raise DamagedError(f"it has no manifest {path}, so its save was not finished") from None
    except ValueError as error:
        raise DamagedError(f"its manifest {error}") from error
    if not _is_manifest(content) or content.pop("sha256", None) not in (None, _sum(content)):
        raise DamagedError(f"its manifest {path} is damaged: it is not what was written")
    return content


def write(path: files.Path, content: dict[str, Any]) -> None:
    """Write a manifest with its own SHA-256, atomically."""
    content = json.loads(json.dumps(content))  # as it will be read
    files.write_json(path, content | {"sha256": _sum(content)})


def _sum(manifest: dict[str, Any]) -> str:
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_manifest(content: Any) -> bool:
    def maps(value: Any, kind: type) -> bool:
        return isinstance(value, dict) and all(isinstance(v, kind) for v in value.values())

    return (
        maps(content, object)
        and {"files", "arrays"} <= set(content) <= {"files", "arrays", "amended", "sha256"}
        and maps(content["files"], dict)
        and all({"size", "sha256"} <= set(entry) for entry in content["files"].values())
        and maps(content["arrays"], str)
        and maps(content.get("amended", {}), dict)
    )
