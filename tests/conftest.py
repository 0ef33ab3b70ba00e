"""Strict numerics and eight host devices for every test; set before JAX wakes up."""

import gc
import os
import sys
import tempfile

import compilation
import fake_bucket
import launching

os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        *compilation.FLAGS,
    )
)
# Bytecode is kept even where a variable forbids it: two dozen processes import the same sources.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

# Tracing allocates millions of small objects; collecting them less often saves a tenth of the time.
gc.set_threshold(200_000, 20, 20)

import jax  # noqa: E402
import pytest  # noqa: E402

# [B] times [B, L] by accident is how diffusion code goes wrong; typed keys make reuse an error.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
# Programs carry one frame of the source, not all of them, which takes a tenth of the time.
jax.config.update("jax_include_full_tracebacks_in_locations", False)
compilation.share_contexts()


@pytest.fixture(scope="module", autouse=True)
def follow_keys(request):
    """Programs are searched for keys used twice, except in modules marked ``keyless``."""
    with jax.debug_key_reuse(request.node.get_closest_marker("keyless") is None):
        yield


def pytest_configure(config):
    """One compilation cache for the launchers of all workers, who inherit its name."""
    if not hasattr(config, "workerinput"):
        cache = tempfile.TemporaryDirectory(prefix="mdm_jax-tests-")
        os.environ[launching.CACHE] = cache.name
        config.add_cleanup(cache.cleanup)


def pytest_collection_modifyitems(items):
    """Modules marked ``first`` begin first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The directory that stands for ``gs://bucket``."""
    return fake_bucket.install(tmp_path / "buckets", monkeypatch)


@pytest.fixture(scope="module")
def one_device():
    """For modules whose experiments need one of the devices only."""
    with pytest.MonkeyPatch.context() as patch:
        launching.on_one_device(patch)
        yield
