"""Checkpoints: round trips, damage that is named and set aside, misfits, keeping, meshes."""

import json
import logging as python_logging
import pathlib
import shutil
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from mdm_jax import files, sharding, training, variance
from mdm_jax.launch import presets
from mdm_jax.launch.build import make_experiment
from mdm_jax.training import manifests
from mdm_jax.training.checkpoints import CheckpointError, CheckpointReader, Checkpoints, abstract
from mdm_jax.training.manifests import DamagedError
from mdm_jax.training.store import named_leaves
from mdm_jax.variance.transform import Phase


def _state(seed=0, width=3):
    rng = np.random.default_rng(seed)
    return {
        "params": {"kernel": jnp.asarray(rng.normal(size=(width, 4)), jnp.float32)},
        "low": jnp.asarray(rng.normal(size=(5,)), jnp.bfloat16),
        "step": jnp.int32(seed),
    }


@pytest.fixture
def opened(tmp_path):
    """(directory, function that opens it); closes all that were opened."""
    managers = []

    def open_again(keep_last=2):
        managers.append(Checkpoints(tmp_path, keep_last))
        return managers[-1]

    yield tmp_path, open_again
    for manager in managers:
        manager.close()


def _fill(open_again, steps=(4, 8), keep_last=2):
    checkpoints = open_again(keep_last)
    for step in steps:
        checkpoints.save(step, _state(step), {"batches": step}, {"window": [[step, 0.1]]})
    checkpoints.wait()
    return checkpoints


def _best(open_again, step, loss):
    checkpoints = open_again()
    assert checkpoints.save_best(step, _state(step), {"loss": loss})
    checkpoints.wait()


def _assert_holds(restored, step):
    chex.assert_trees_all_equal(restored.state, _state(step))
    chex.assert_trees_all_equal_dtypes(restored.state, _state(step))
    assert restored.position == {"batches": step}
    assert restored.notes == {"window": [[step, 0.1]]}


def test_round_trip_of_the_newest(opened):
    _, open_again = opened
    assert open_again().restore_last(abstract(_state())) is None
    _fill(open_again)
    checkpoints = open_again()
    assert checkpoints.steps() == [4, 8]
    _assert_holds(checkpoints.restore_last(abstract(_state())), 8)


def test_train_state_with_a_stateful_chain_keeps_every_leaf(opened):
    """Nested optimiser states, empty states and a transform's own state."""
    _, open_again = opened
    chain = variance.chain(
        variance.stratified(),
        variance.VarianceTransform(
            name="histogram",
            phase=Phase.WARP,
            init=lambda spec: {"counts": jnp.arange(5, dtype=jnp.int32), "mean": (jnp.ones(()),)},
            draw=lambda key, state, draw, spec: draw,
            update=lambda state, draw, stats: state,
        ),
    )
    optimizer = training.adamw(optax.constant_schedule(0.1))
    spec, _ = tiny.step_fn(8)
    state = tiny.perturbed(tiny.new_state(spec, optimizer, chain))
    checkpoints = open_again()
    checkpoints.save(1, state, {}, {})
    restored = checkpoints.restore_last(abstract(state))
    chex.assert_trees_all_equal(restored.state, state)
    assert isinstance(restored.state, training.TrainState)


def test_notes_keep_floats_and_nan(opened):
    _, open_again = opened
    window = [[0.1, float(np.float32(1) / 3), float("nan"), 1e-30]]
    checkpoints = open_again()
    checkpoints.save(1, _state(), {}, {"window": window})
    found = checkpoints.restore_last(abstract(_state())).notes["window"]
    np.testing.assert_array_equal(found, window)


def test_only_the_last_are_kept(opened):
    directory, open_again = opened
    checkpoints = _fill(open_again, (1, 2, 3, 4, 5), keep_last=3)
    assert checkpoints.steps() == [3, 4, 5]
    assert _fill(open_again, (6, 7, 8), keep_last=9).steps() == [3, 4, 5, 6, 7, 8]
    checkpoints = _fill(open_again, (9,), keep_last=3)
    assert checkpoints.steps() == [7, 8, 9]
    manifests = sorted(path.name for path in (directory / "manifests" / "last").iterdir())
    assert manifests == ["7.json", "8.json", "9.json"]
    with pytest.raises(ValueError, match="keep_last must be at least 1"):
        Checkpoints(directory, 0)


def test_a_step_that_is_there_is_left_as_it_is(opened):
    _, open_again = opened
    checkpoints = _fill(open_again)
    checkpoints.save(8, _state(99), {"batches": 99}, {})
    checkpoints.wait()
    _assert_holds(open_again().restore_last(abstract(_state())), 8)


# --- damage -------------------------------------------------------------------------------------


def test_a_full_disk_is_said_before_anything_is_written(opened, monkeypatch):
    directory, open_again = opened
    checkpoints = _fill(open_again)
    needed = 2**20 + sum(leaf.nbytes for leaf in jax.tree.leaves(_state()))
    left = [needed - 1]
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - left[0], left[0])
    )
    before = sorted(directory.rglob("*"))
    with pytest.raises(CheckpointError, match=r"last/12 cannot be written: it takes 1.0 MiB and"):
        checkpoints.save(12, _state(12), {}, {})
    assert sorted(directory.rglob("*")) == before and checkpoints.steps() == [4, 8]
    left[0] = needed
    checkpoints.save(12, _state(12), {}, {})
    checkpoints.wait()
    assert checkpoints.steps() == [8, 12]


def _largest(directory):
    """The file that holds the arrays."""
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def _truncate(directory):
    path = _largest(directory)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def _flip(directory):
    path = _largest(directory)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    return path


def _remove(directory):
    path = _largest(directory)
    path.unlink()
    return path


def _empty_position(directory):
    path = directory / "position" / "metadata"
    path.write_text("{}")
    return path


DAMAGE = {
    "truncated": (_truncate, "bytes instead of"),
    "one bit": (_flip, "has changed since it was written"),
    "missing": (_remove, "is missing"),
    "position": (_empty_position, "bytes instead of"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_set_aside_and_replaced(opened, caplog, kind):
    directory, open_again = opened
    _fill(open_again)
    damage, words = DAMAGE[kind]
    file = damage(directory / "last" / "8").relative_to(directory / "last" / "8").as_posix()
    checkpoints = open_again()
    with caplog.at_level(python_logging.WARNING):
        _assert_holds(checkpoints.restore_last(abstract(_state())), 4)
    message = caplog.text
    aside = directory / "damaged-last-8-0"
    for part in (file, words, str(directory / "last" / "8"), str(aside)):
        assert part in message
    assert aside.is_dir() and list(aside.rglob("*"))  # not deleted
    assert checkpoints.steps() == [4]
    # The run goes on and meets the step again.
    checkpoints.save(8, _state(8), {"batches": 8}, {"window": [[8, 0.1]]})
    checkpoints.wait()
    again = open_again()
    _assert_holds(again.restore_last(abstract(_state())), 8)
    _flip(directory / "last" / "8")
    _assert_holds(open_again().restore_last(abstract(_state())), 4)
    assert (directory / "damaged-last-8-1").is_dir()


def test_when_all_are_damaged_the_error_says_so(opened):
    directory, open_again = opened
    _fill(open_again)
    for step in (4, 8):
        _truncate(directory / "last" / str(step))
    with pytest.raises(CheckpointError, match=r"none of the checkpoints at steps \[4, 8\]"):
        open_again().restore_last(abstract(_state()))
    assert (directory / "damaged-last-4-0").is_dir() and (directory / "damaged-last-8-0").is_dir()
    for _ in range(2):  # nor does a second call, or a third, take the run for a new one
        with pytest.raises(CheckpointError, match="saved damaged-last-4-0, damaged-last-8-0 in"):
            open_again().restore_last(abstract(_state()))


def test_a_damaged_manifest_counts_as_damage(opened, caplog):
    directory, open_again = opened
    _fill(open_again)
    manifest = directory / "manifests" / "last" / "8.json"
    manifest.write_text(manifest.read_text()[:50])
    _assert_holds(open_again().restore_last(abstract(_state())), 4)
    assert str(manifest) in caplog.text


def test_one_flipped_bit_anywhere_in_a_manifest_is_damage(opened, caplog):
    directory, open_again = opened
    checkpoints = _fill(open_again)
    path = directory / "manifests" / "last" / "8.json"
    whole = path.read_bytes()
    for number in range(0, len(whole), 5):
        flipped = bytearray(whole)
        flipped[number] ^= 1
        path.write_bytes(bytes(flipped))
        with pytest.raises(DamagedError, match="manifest"):
            checkpoints._last.manifest(8)
    # A shape, which would otherwise be said not to fit.
    assert whole.count(b"float32[3, 4]") == 1
    path.write_bytes(whole.replace(b"float32[3, 4]", b"float32[3, 5]"))
    _assert_holds(open_again().restore_last(abstract(_state())), 4)
    assert "not what was written" in caplog.text and (directory / "damaged-last-8-0").is_dir()


@pytest.mark.parametrize(
    "content",
    [
        '{"files": [1], "arrays": {}}',
        '{"files": {"a": 3}, "arrays": {}}',
        '{"files": {"a": {"size": 3}}, "arrays": {}}',
        '{"files": {}, "arrays": {"low": 3}}',
        '{"files": {}, "arrays": {}, "amended": {"notes": 3}}',
        '{"files": {}}',
        "[]",
        "{",
        "",
        "\xff",
    ],
)
def test_a_manifest_that_is_none_is_damage(opened, content):
    directory, open_again = opened
    checkpoints = _fill(open_again)
    (directory / "manifests" / "last" / "8.json").write_bytes(content.encode("latin-1"))
    checkpoints.amend_notes(8, {"window": []})  # neither in the way of the run
    checkpoints.wait()
    with pytest.raises(DamagedError, match="manifest"):
        checkpoints._last.manifest(8)
    _assert_holds(open_again().restore_last(abstract(_state())), 4)


def test_manifests_of_earlier_releases_have_no_sum_of_their_own(opened):
    directory, open_again = opened
    _fill(open_again)
    path = directory / "manifests" / "last" / "8.json"
    content = json.loads(path.read_text())
    assert set(content) == {"files", "arrays", "sha256"}
    del content["sha256"]
    path.write_text(json.dumps(content))
    _assert_holds(open_again().restore_last(abstract(_state())), 8)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_checkpoint_without_its_manifest_is_damaged(opened, damaged):
    """Nobody could tell whether its arrays are as they were written."""
    directory, open_again = opened
    _fill(open_again)
    (directory / "manifests" / "last" / "8.json").unlink()
    if damaged:
        _flip(directory / "last" / "8")
    _assert_holds(open_again().restore_last(abstract(_state())), 4)
    assert (directory / "damaged-last-8-0").is_dir()


def test_killed_before_the_manifest_the_one_before_is_still_there(opened, monkeypatch):
    """Even where only one is kept; killed in the very first save the run may start over."""
    directory, open_again = opened

    def kill(*_):
        raise KeyboardInterrupt

    def killed(step):
        checkpoints = open_again(keep_last=1)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(manifests, "write", kill)
            checkpoints.save(step, _state(step), {"batches": step}, {"window": [[step, 0.1]]})
            checkpoints.wait()

    open_again().begin()
    killed(4)
    checkpoints = open_again(keep_last=1)
    assert checkpoints.restore_last(abstract(_state())) is None and checkpoints.unsaved
    _fill(open_again, steps=(4,), keep_last=1)
    assert not open_again().unsaved
    killed(8)
    _assert_holds(open_again(keep_last=1).restore_last(abstract(_state())), 4)
    assert (directory / "damaged-last-8-0").is_dir()


def test_killed_while_saving_leaves_the_one_before(opened, caplog):
    directory, open_again = opened
    _fill(open_again)
    half = directory / "last" / "12.orbax-checkpoint-tmp"
    shutil.copytree(directory / "last" / "8", half)
    _remove(half)
    checkpoints = open_again()
    _assert_holds(checkpoints.restore_last(abstract(_state())), 8)
    checkpoints.save(12, _state(12), {"batches": 12}, {"window": [[12, 0.1]]})
    checkpoints.wait()
    assert "12.orbax" not in caplog.text
    _assert_holds(open_again().restore_last(abstract(_state())), 12)


# --- in the background --------------------------------------------------------------------------


def test_the_buffers_of_a_state_may_be_donated_while_it_is_written(opened):
    """Orbax writes from the buffers of the CPU themselves: JAX then copies what it is given."""
    _, open_again = opened
    state = {"kernel": jnp.arange(2**22, dtype=jnp.float32)}
    expected = np.array(state["kernel"])
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    checkpoints = open_again()
    shapes = abstract(state)
    checkpoints.save(1, state, {}, {})
    for _ in range(20):
        state = step(state)
    found = checkpoints.restore_last(shapes).state["kernel"]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(state["kernel"], expected + 20)


def test_saving_does_not_wait_for_the_files(opened, monkeypatch):
    """Readers have the old state, the notes follow what they are about, records are copies."""
    directory, open_again = opened
    checkpoints = _fill(open_again)
    go_on, digests = threading.Event(), manifests.digests
    monkeypatch.setattr(manifests, "digests", lambda *files: go_on.wait(60) and digests(*files))
    notes = {"window": [[12, 0.1]]}
    checkpoints.save(12, _state(12), {"batches": 12}, notes)
    checkpoints.amend_notes(12, notes)
    notes["window"] = []
    checkpoints.check()
    assert checkpoints.steps() == [4, 8, 12] and not (directory / "manifests/last/12.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(manifests, "digests", digests)
        reader = CheckpointReader(directory)
        _assert_holds(reader.restore_last(abstract(_state())), 8)
        reader.close()
    before = checkpoints.waited
    go_on.set()
    checkpoints.wait()
    assert checkpoints.waited > before
    assert checkpoints.steps() == [8, 12]
    _assert_holds(checkpoints.restore_last(abstract(_state())), 12)


def test_an_error_of_the_background_is_raised_by_what_comes_next(opened, monkeypatch):
    """And a run that has saved nothing yet may still start over."""
    directory, open_again = opened
    checkpoints = open_again()
    checkpoints.begin()
    failed = threading.Event()

    def full(*_):
        failed.set()
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(manifests, "digests", full)
        checkpoints.save(4, _state(4), {"batches": 4}, {})
        checkpoints.amend_notes(4, {})
        assert failed.wait(60)
        with pytest.raises(OSError, match="no space left"):
            checkpoints.save(8, _state(8), {"batches": 8}, {})
    assert checkpoints.unsaved and not list((directory / "manifests/last").iterdir())


def test_files_are_described_by_who_writes_them_and_read_by_all():
    names = [f"state/ocdbt.process_{i}/d/{i}" for i in (0, 1, 12)]
    names += ["state/array_metadatas/process_1", "notes/metadata", "state/process_1x/d"]
    owned = {p: manifests.written_by(p, names) for p in (0, 1, 12)}
    assert owned[1] == [names[1], names[3]] and owned[12] == [names[2]]
    assert sorted(sum(owned.values(), [])) == sorted(names)
    entries = {name: {"size": 2**i} for i, name in enumerate(names)}
    shares = [manifests.share_of(process, 4, entries) for process in range(4)]
    assert sorted(name for share in shares for name in share) == sorted(names)
    assert len(shares[0]) == 2 and list(shares[0])[0] == names[-1]  # the largest one first


# --- reading while another process trains -------------------------------------------------------


def _tree(directory):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in directory.rglob("*")}


def test_a_reader_changes_nothing(opened, caplog):
    """Neither a save in progress, nor what is damaged, nor a manifest that is not written yet."""
    directory, open_again = opened
    trainer = _fill(open_again, (4, 8, 12), keep_last=3)
    trainer.save_best(4, _state(4), {"loss": 1.0})
    trainer.wait()
    shutil.copytree(directory / "last" / "8", directory / "last" / "16.orbax-checkpoint-tmp")
    _flip(directory / "last" / "8")
    (directory / "manifests" / "last" / "12.json").unlink()
    before = _tree(directory)
    reader = CheckpointReader(directory)
    _assert_holds(reader.restore_last(abstract(_state())), 4)
    chex.assert_trees_all_equal(reader.restore_best(abstract(_state())), _state(4))
    chex.assert_trees_all_equal(reader.restore_step(12, abstract(_state())), _state(12))
    reader.close()
    assert _tree(directory) == before
    assert f"{directory / 'last' / '8'} is damaged" in caplog.text and "stays" in caplog.text
    _truncate(directory / "last" / "4")
    with pytest.raises(CheckpointError, match=r"none of .* at steps \[4, 8, 12\].*warn"):
        CheckpointReader(directory).restore_last(abstract(_state()))


def test_a_reader_makes_no_directory(tmp_path):
    reader = CheckpointReader(tmp_path / "nowhere" / "checkpoints")
    assert reader.steps() == [] and reader.best_metrics() is None
    assert reader.restore_last(abstract(_state())) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_reader_follows_a_trainer_that_replaces_what_it_reads(opened, monkeypatch, when):
    directory, open_again = opened
    trainer = _fill(open_again)
    trainer.save_best(4, _state(4), {"loss": 2.0})
    trainer.wait()
    reader = CheckpointReader(directory)
    assert reader.best_metrics()["step"] == 4

    def train_on():
        for step in (12, 16):
            trainer.save(step, _state(step), {"batches": step}, {"window": [[step, 0.1]]})
        trainer.save_best(16, _state(16), {"loss": 1.0})
        trainer.wait()

    if when == "before":
        train_on()
    else:
        read = reader._last._read

        def slow_read(step, *arguments):
            found = read(step, *arguments)
            if step == 8:
                train_on()
            return found

        monkeypatch.setattr(reader._last, "_read", slow_read)
    _assert_holds(reader.restore_last(abstract(_state())), 16)
    chex.assert_trees_all_equal(reader.restore_best(abstract(_state())), _state(16))
    assert reader.best_metrics() == {"step": 16, "loss": 1.0}
    reader.close()


# --- steps that come again ----------------------------------------------------------------------


def test_amended_notes_are_those_restored(opened):
    directory, open_again = opened
    checkpoints = _fill(open_again)
    checkpoints.amend_notes(8, {"window": [], "hooks_due": []})
    checkpoints.wait()
    (directory / "manifests" / "last" / "4.json").unlink()
    checkpoints.amend_notes(4, {"window": []})  # its manifest is not written yet: nothing to do
    checkpoints.wait()
    restored = open_again().restore_last(abstract(_state()))
    assert restored.notes == {"window": [], "hooks_due": []}
    chex.assert_trees_all_equal(restored.state, _state(8))
    assert restored.position == {"batches": 8}


def test_a_step_below_the_latest_is_not_taken_for_saved(opened):
    _, open_again = opened
    checkpoints = _fill(open_again)
    with pytest.raises(CheckpointError, match=r"step 6 cannot be saved .* later steps \[4, 8\]"):
        checkpoints.save(6, _state(6), {}, {})
    assert open_again().steps() == [4, 8]


def test_a_better_step_before_the_best_takes_its_place(opened):
    """A run that was resumed before it, with other settings."""
    directory, open_again = opened
    _best(open_again, 8, 2.0)
    checkpoints = open_again()
    assert checkpoints.save_best(4, _state(4), {"loss": 1.0})
    checkpoints.wait()
    for found in (checkpoints, open_again()):
        assert found.best_metrics() == {"step": 4, "loss": 1.0}
        chex.assert_trees_all_equal(found.restore_best(abstract(_state())), _state(4))
    assert [p.name for p in (directory / "best").iterdir()] == ["4"]
    assert [p.name for p in (directory / "manifests" / "best").iterdir()] == ["4.json"]


# --- misfits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["shape", "dtype", "more", "fewer"])
def test_a_whole_checkpoint_that_does_not_fit_is_refused_and_kept(opened, change):
    directory, open_again = opened
    _fill(open_again)
    wanted = _state(width=7 if change == "shape" else 3)
    if change == "dtype":
        wanted["low"] = wanted["low"].astype(jnp.float32)
    elif change == "more":
        wanted["extra"] = jnp.zeros(2)
    elif change == "fewer":
        del wanted["low"]
    expected = {
        "shape": r"params/kernel is float32\[3, 4\], wanted float32\[7, 4\]",
        "dtype": r"low is bfloat16\[5\], wanted float32\[5\]",
        "more": r"extra is absent, wanted float32\[2\]",
        "fewer": r"low is bfloat16\[5\], wanted absent",
    }
    with pytest.raises(
        CheckpointError, match="does not fit this configuration.*" + expected[change]
    ):
        open_again().restore_last(abstract(wanted))
    assert not list(directory.glob("damaged*"))
    _assert_holds(open_again().restore_last(abstract(_state())), 8)


# --- best ---------------------------------------------------------------------------------------


OTHER = {"moments": {"first": jnp.zeros((7,)), "count": jnp.int32(0)}}
"""What a state with another optimiser has instead of "low"."""


def _with_other_optimizer():
    state = _state()
    return abstract({"params": state["params"], "step": state["step"]} | OTHER)


def _assert_fields(restored, step):
    found, expected = restored.state, _state(step)
    assert jax.tree.leaves([v for name, v in found.items() if name not in expected]) == []
    chex.assert_trees_all_equal(found["params"], expected["params"])
    assert int(found["step"]) == step


def test_fields_come_back_under_another_optimizer(opened):
    directory, open_again = opened
    fields = ("params", "step")
    assert open_again().restore_last_fields(_with_other_optimizer(), fields) is None
    _fill(open_again)
    with pytest.raises(CheckpointError, match="moments/count is absent|wanted absent"):
        open_again().restore_last(_with_other_optimizer())
    _assert_fields(open_again().restore_last_fields(_with_other_optimizer(), fields), 8)
    _assert_fields(open_again().restore_last_fields(abstract(_state()), fields), 8)
    wider = abstract(_state(width=5))
    with pytest.raises(CheckpointError, match=r"params/kernel is float32\[3, 4\]"):
        open_again().restore_last_fields(wider, fields)
    assert open_again().steps() == [4, 8] and not list(directory.glob("damaged-*"))


def test_fields_of_a_damaged_checkpoint_come_from_the_one_before(opened):
    directory, open_again = opened
    _fill(open_again)
    (directory / "manifests" / "last" / "8.json").write_text("{")
    found = open_again().restore_last_fields(_with_other_optimizer(), ("params", "step"))
    _assert_fields(found, 4)
    assert len(list(directory.glob("damaged-last-8-*"))) == 1


def test_fields_keep_the_sharding_that_the_rest_is_asked_for_with(opened):
    """What fits is asked for as the caller would lay it out, not whole on every device."""
    _, open_again = opened
    checkpoints = _fill(open_again)
    mesh = jax.make_mesh((2,), ("fsdp",), devices=jax.devices()[:2])
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def place(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split if leaf.ndim else whole)

    state = jax.tree.map(place, {"params": _state()["params"], "step": _state()["step"]})
    asked = checkpoints._last.as_saved(
        {"params/kernel": state["params"]["kernel"], "step": state["step"]}, ("step",)
    )
    assert asked["params/kernel"].sharding == split  # not among the fields, and it fits
    assert asked["low"].sharding == whole  # nobody said how
    found = checkpoints.restore_last_fields(state, ("params",)).state
    assert found["params"]["kernel"].sharding == split


def test_the_best_is_the_lowest_finite_loss(opened):
    directory, open_again = opened
    checkpoints = open_again()
    assert checkpoints.best_metrics() is None
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        checkpoints.restore_best(abstract(_state()))
    losses = [float("nan"), 3.0, 2.0, 2.0, float("inf"), 2.5, 1.5, float("nan"), 4.0]
    kept = [
        checkpoints.save_best(step, _state(step), {"loss": loss, "other": 7.0})
        for step, loss in enumerate(losses)
    ]
    checkpoints.wait()
    assert kept == [False, True, True, False, False, False, True, False, False]
    for found in (checkpoints, open_again()):
        assert found.best_metrics() == {"step": 6, "loss": 1.5, "other": 7.0}
        chex.assert_trees_all_equal(found.restore_best(abstract(_state())), _state(6))
    assert [p.name for p in (directory / "best").iterdir()] == ["6"]
    # A resumed run comes by the same evaluation again.
    assert not open_again().save_best(6, _state(6), {"loss": 1.5})


def test_a_damaged_best_is_set_aside_and_the_next_one_takes_its_place(opened, caplog):
    directory, open_again = opened
    _best(open_again, 3, 1.0)
    file = _truncate(directory / "best" / "3")
    checkpoints = open_again()
    assert checkpoints.best_metrics() is None
    assert file.name in caplog.text and (directory / "damaged-best-3-0").is_dir()
    assert checkpoints.save_best(5, _state(5), {"loss": 9.0})
    checkpoints.wait()
    chex.assert_trees_all_equal(open_again().restore_best(abstract(_state())), _state(5))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_damaged_records_of_the_best_do_not_hide_the_last(opened, caplog, content):
    """Orbax reads files of this name when it opens."""
    directory, open_again = opened
    _fill(open_again)
    _best(open_again, 8, 2.0)
    (directory / "best" / "8" / "metrics" / "metrics").write_bytes(content)
    checkpoints = open_again()
    _assert_holds(checkpoints.restore_last(abstract(_state())), 8)
    assert checkpoints.best_metrics() is None and "metrics/metrics has" in caplog.text


def test_a_best_of_another_shape_does_not_fit(opened):
    _, open_again = opened
    _best(open_again, 3, 1.0)
    with pytest.raises(CheckpointError, match="does not fit this configuration"):
        open_again().restore_best(abstract(_state(width=9)))


# --- paths --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["lr[0.1]", "[!a]", "a*", "a?b", "ü {x,y}", 'q"u#o%41', "new\nline", "tilde~", "c:d"]
)
def test_a_directory_of_any_name_keeps_a_run(tmp_path, name):
    """Orbax looks for what it has written by a pattern."""
    for directory, step in ((tmp_path / "abb", 4), (tmp_path / name, 8)):
        checkpoints = Checkpoints(directory / "checkpoints")
        checkpoints.save(4, _state(step), {"batches": step}, {"window": [[step, 0.1]]})
        checkpoints.close()
    reader = CheckpointReader(tmp_path / name / "checkpoints")
    _assert_holds(reader.restore_last(abstract(_state())), 8)
    reader.close()


@pytest.mark.parametrize(
    "name",
    ["back\\slash", "\udcff", "gs://b/a?b", "s3://b/r", "f:///r", "gs:/b/r", "/gs/r", "/s3/r"],
)
def test_a_directory_in_which_orbax_would_lose_a_run_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="below a name with|in UTF-8|local directory or|a bucket"):
        Checkpoints(name)
    assert not list(tmp_path.iterdir())


def test_a_bucket_keeps_a_run(bucket):
    """Damage, amended notes and the falling back work as on a disk."""
    root = files.as_path("gs://bucket/run/checkpoints")
    trainer = Checkpoints(root)
    assert trainer.restore_last(abstract(_state())) is None
    trainer.begin()
    for step in (4, 8, 12):
        assert trainer.unsaved == (step == 4)
        trainer.save(step, _state(step), {"batches": step}, {"window": [[step, 0.1]]})
        trainer.wait()
    assert trainer.save_best(8, _state(8), {"loss": 1.0})
    trainer.wait()
    assert trainer.steps() == [8, 12]
    trainer.close()
    saved = {path.relative_to(bucket).as_posix() for path in bucket.rglob("*") if path.is_file()}
    assert "run/checkpoints/manifests/last/12.json" in saved
    assert "run/checkpoints/best/8/ema/_METADATA" in saved
    reader = CheckpointReader(root)
    _assert_holds(reader.restore_last(abstract(_state())), 12)
    chex.assert_trees_all_equal(reader.restore_best(abstract(_state())), _state(8))
    reader.close()
    _flip(bucket / "run/checkpoints/last/12")
    trainer = Checkpoints(root)
    _assert_holds(trainer.restore_last(abstract(_state())), 8)
    trainer.close()
    assert (bucket / "run/checkpoints/damaged-last-12-0").is_dir()


# --- meshes -------------------------------------------------------------------------------------


def test_a_state_of_eight_devices_restores_on_one_and_on_other_meshes(opened):
    _, open_again = opened
    model = tiny.transformer()
    variables = training.linen_init(model, tiny.LENGTH)

    def init():
        return variables(jax.random.key(0))

    def shapes(**sizes):
        return sharding.abstract_sharded(init, sharding.make_mesh(**sizes))

    same = shapes(data=2, fsdp=2, tensor=2)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, same)
    saved = jax.device_put(tiny.parameters(model, tiny.LENGTH), shardings)
    checkpoints = open_again()
    checkpoints.save(1, saved, {}, {})
    checkpoints.wait()
    one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    alone = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one), saved)
    targets = {"one": alone, "other": shapes(data=1, fsdp=8), "same": same}
    for name, target in targets.items():
        found = open_again().restore_last(target).state
        chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(saved))
        for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(target)):
            assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim), name


def test_checkpoints_of_earlier_releases_fit():
    """The arrays of quickstart's smoke run, by the names under which they were always saved."""
    recorded = pathlib.Path(tiny.__file__).with_name("quickstart_arrays.json").read_text("utf-8")
    state = make_experiment(presets.quickstart("smoke")).abstract_state()
    leaves = named_leaves(state)
    # But for the monitors, which start afresh where they do not fit.
    recorded = {n: form for n, form in json.loads(recorded).items() if "monitors/" not in n}
    found = {n: f"{a.dtype}{list(a.shape)}" for n, a in leaves.items() if "monitors/" not in n}
    assert found == recorded
