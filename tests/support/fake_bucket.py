"""A bucket for tests: ``gs://`` paths kept in a directory, with the manners of objects."""

import os
import pathlib

from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem


def install(directory: pathlib.Path, monkeypatch) -> pathlib.Path:
    """``gs://bucket`` is ``directory / "bucket"`` from here on; returns that.

    Files are those of an object store: nothing is appended, empty directories do not exist, and
    Orbax's arrays, which never pass through fsspec, are led to the same place.
    """
    from orbax.checkpoint._src.serialization import tensorstore_utils

    class Bucket(LocalFileSystem):
        protocol = ("gs", "gcs")
        cachable = False

        def __init__(self, **_):
            super().__init__(auto_mkdir=False)

        @classmethod
        def _strip_protocol(cls, path):
            text = os.fspath(path)
            if text.startswith("gs://"):
                text = str(directory / text.removeprefix("gs://"))
            return super()._strip_protocol(text)

        def open(self, path, mode="rb", **options):
            if "a" in mode or "+" in mode:
                raise NotImplementedError("nothing is appended to an object")
            if "w" in mode:
                os.makedirs(os.path.dirname(self._strip_protocol(path)), exist_ok=True)
            return super().open(path, mode, **options)

        def exists(self, path, **_):
            return self.isfile(path) or self.isdir(path)

        def isdir(self, path):
            return any(names for _, _, names in os.walk(self._strip_protocol(path)))

        def mkdir(self, path, **_):
            pass

        def makedirs(self, path, **_):
            pass

        def walk(self, *_, **__):
            raise NotImplementedError("epath loses the gs:// of what gcsfs gives it")

    def kvstore(path):
        slash = "" if path.endswith("_sharding") else "/"  # the one file among directories
        return {"driver": "file", "path": Bucket._strip_protocol(path) + slash}

    monkeypatch.setattr(
        backend._FileSystemSpecBackend, "_get_filesystem", lambda self, name: Bucket()
    )
    gcs = tensorstore_utils.gcs_utils
    monkeypatch.setattr(gcs, "get_kvstore_for_gcs", kvstore)
    monkeypatch.setattr(gcs, "is_hierarchical_namespace_enabled", lambda _: False)
    return directory / "bucket"
