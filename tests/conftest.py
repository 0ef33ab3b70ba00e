"""Strict numerics and eight host devices for every test; set before JAX wakes up."""

import os
import sys
import tempfile

import compilation
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

import jax  # noqa: E402
import pytest  # noqa: E402

# [B] times [B, L] by accident is how diffusion code goes wrong; typed keys make reuse an error.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
# Programs carry one frame of the source, not all of them, which takes a tenth of the time.
jax.config.update("jax_include_full_tracebacks_in_locations", False)

_LONGEST = ("test_launch", "test_variance_zoo", "test_adaptive_levels", "test_notebooks")
"""Files that begin first, so that no worker is left alone with one of them at the end."""


_KEYLESS = (
    "test_schedules",
    "test_gaussian_weightings",
    "test_gaussian_outputs",
    "test_gaussian_paths",
    "test_activations",
    "test_attention",
    "test_kv_cache",
    "test_products",
    "test_rematerialisation",
    "test_token_loss",
    "test_variance_densities",
    "test_inverse_rate_tail",
)
"""Files without random keys, whose programs are not walked in search of keys used twice."""


@pytest.fixture(scope="module", autouse=True)
def follow_keys(request):
    with jax.debug_key_reuse(not request.path.stem.startswith(_KEYLESS)):
        yield


def pytest_configure(config):
    """One compilation cache for the launchers of all workers, who inherit its name."""
    if not hasattr(config, "workerinput"):
        cache = tempfile.TemporaryDirectory(prefix="mdm_jax-tests-")
        os.environ[launching.CACHE] = cache.name
        config.add_cleanup(cache.cleanup)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.path.stem.startswith(_LONGEST))


@pytest.fixture(scope="module")
def one_device():
    """For modules whose experiments need one of the devices only."""
    with pytest.MonkeyPatch.context() as patch:
        launching.on_one_device(patch)
        yield
