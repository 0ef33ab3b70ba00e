"""Several real processes, on the CPU: one run whatever their number, and whoever of them dies."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import chex
import jax
import launching
import numpy as np
import process_script
import pytest

from mdm_jax import sharding, training
from mdm_jax.hub.files import TensorFiles
from mdm_jax.launch import command_line

STEPS = 12
ARGUMENTS = [
    f"--config={launching.QUICKSTART}",
    f"--config.train.steps={STEPS}",
    "--config.train.log_every=1",
    "--config.train.checkpoint_every=4",
    "--config.train.evaluate_every=8",
    "--config.optimizer.name=adamw",  # compiles in half the time
    "--config.optimizer.peak=0.01",
    "--config.variance.order=('stratified', 'ppots_slopes', 'mirror')",
    "--config.variance.ppots_slopes.warmup_steps=2",
    "--config.sample.num_samples=1",
    "--config.sample.gap=0",
    "--config.panel.cost=0.5",  # the noise panel measures at step 4
]


def observed(count: int, devices: int, directory) -> dict:
    """What ``process_script`` prints in ``count`` processes, which save in a directory."""
    address = f"localhost:{launching.free_port()}"
    started = [
        subprocess.Popen(
            [sys.executable, process_script.__file__, address, str(count), str(number), directory],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**launching.environment(devices), "PYTHONPATH": str(launching.ROOT)},
        )
        for number in range(count)
    ]
    found = launching.finish_several(started)
    assert all(code == 0 for code, _, _ in found), found
    return json.loads(found[0][1].strip().splitlines()[-1])


def assert_same_numbers(found: dict, expected: dict) -> None:
    """Draws and rows bit for bit, results up to the order of summation."""
    for name in ("draw", "rows", "row_index", "generated"):
        assert found[name] == expected[name]
    for name in ("losses", "parameters", "evaluation"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


@pytest.mark.parametrize("count,devices", [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_processes_draw_read_score_and_save_as_one(count, devices, tmp_path):
    alone = process_script.observe()
    record = observed(count, devices, tmp_path / "checkpoints")
    assert_same_numbers(record["found"], alone)
    assert alone["rows_read"] == 13 and record["found"]["rows_read"] == 8 // count + -(-5 // count)
    assert record["rows_of_all"] == alone["rows"]  # where each process needs all rows
    assert record["first"] == {"of": 0} and record["any"] == [True, False]
    assert record["stopping"] == [False, True]  # asked for in another process
    assert record["local"] == process_script.ROWS // count
    # Each process described its own files; damage of one is found, and one process goes on.
    saved, state = record["saved"], process_script.shards(sharding.make_mesh(data=8))
    assert saved["owners"] == [f"ocdbt.process_{number}" for number in range(count)]
    assert saved["notes"] == {"of": 8}
    checkpoints = training.Checkpoints(tmp_path / "checkpoints")
    found = checkpoints.restore_last(training.abstract(state))
    best = checkpoints.restore_best(training.abstract(state))
    checkpoints.close()
    assert checkpoints.steps() == [8] and (tmp_path / "checkpoints/damaged-last-12-0").is_dir()
    assert process_script.digest({"kernel": found.state["kernel"]}) == saved["kernel"]
    expected = jax.tree.map(lambda x: np.asarray(x + 1), state)
    chex.assert_trees_all_equal(found.state, expected)
    chex.assert_trees_all_equal(best, expected)


# --- runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The working directory of an uninterrupted run of one process."""
    workdir = tmp_path_factory.mktemp("processes") / "whole"
    launching.finish(*ARGUMENTS, f"--workdir={workdir}")
    return workdir


def finish(workdir, count, *more, devices=1):
    """Runs to the end in ``count`` processes; stdout of process 0."""
    if count == 1:
        return launching.finish(*ARGUMENTS, f"--workdir={workdir}", *more, devices=devices)[0]
    started = launching.start_several(
        count, *ARGUMENTS, f"--workdir={workdir}", *more, devices=devices
    )
    found = launching.finish_several(started)
    assert all(code == 0 for code, _, _ in found), found
    assert all("loss" not in err and "report" not in out for _, out, err in found[1:])
    return found[0][1]


def stop_at(workdir, step, then, count, *more, devices=1):
    """Starts ``count`` processes, calls ``then(processes)`` after ``step``; what became of each."""
    started = launching.start_several(
        count, *ARGUMENTS, f"--workdir={workdir}", *more, devices=devices
    )
    seen = []
    for line in started[0].stderr:
        seen.append(line)
        if re.search(rf"step {step}/{STEPS} ", line):
            then(started)
            break
    else:
        raise AssertionError("".join(seen))
    return launching.finish_several(started)


def assert_same_run(workdir, whole):
    """Losses, evaluation and the final state, up to the order of summation."""
    for kind in ("train", "evaluate"):
        first, second = (training.read_metrics(w / "metrics.jsonl", kind) for w in (workdir, whole))
        assert [r["step"] for r in first] == [r["step"] for r in second]
        for a, b in zip(first, second):
            np.testing.assert_allclose(a["loss"], b["loss"], rtol=2e-4)
    first, second = (json.loads((w / "evaluation.json").read_text()) for w in (workdir, whole))
    assert first["rows"] == second["rows"] and first["step"] == second["step"]
    np.testing.assert_allclose(first["bits_per_unit"], second["bits_per_unit"], rtol=2e-4)
    a, b = (state_of(w) for w in (workdir, whole))
    chex.assert_trees_all_close(a.state, b.state, rtol=2e-2, atol=2e-3)
    assert a.position == b.position and a.notes["stream"] == b.notes["stream"]


def state_of(workdir):
    """The newest checkpoint."""
    checkpoints = training.Checkpoints(workdir / "checkpoints")
    step = checkpoints.steps()[-1]
    manifest = json.loads((workdir / f"checkpoints/manifests/last/{step}.json").read_text())
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {}
    for name, form in manifest["arrays"].items():
        dtype, shape = form.split("[")
        shapes[name] = jax.ShapeDtypeStruct(tuple(json.loads(f"[{shape}")), dtype, sharding=device)
    restored = checkpoints.restore_last(shapes)
    checkpoints.close()
    return restored


def kill_second(started):
    started[1].send_signal(signal.SIGKILL)


def kill_all(started):
    for process in started:
        process.send_signal(signal.SIGKILL)


def end_second(started):
    started[1].send_signal(signal.SIGTERM)


@pytest.mark.slow
def test_one_of_two_processes_is_told_to_stop_and_one_process_goes_on(whole, tmp_path):
    """SIGTERM to process 1; both save and end together, halves of every parameter in each."""
    workdir = tmp_path / "run"
    found = stop_at(workdir, 3, end_second, 2, "--config.mesh=data=1,fsdp=2")
    assert [code for code, _, _ in found] == [130, 130], found
    assert "the same command line resumes" in found[0][1] and "resumes" not in found[1][1]
    saved = int(state_of(workdir).state["step"])
    assert 3 <= saved < STEPS
    out = finish(workdir, 1)
    assert f"resuming at step {saved}" in out
    assert_same_run(workdir, whole)


@pytest.mark.slow
def test_two_processes_measure_chains_as_one_and_choose_alike(tmp_path):
    """Parameters in halves, rows over both devices."""
    own = [
        f"--config={launching.QUICKSTART}",
        "--config.variance.order=auto",
        *(f"--config.variance.auto.{s}" for s in ("budget=1", "passes=4", "groups=4", "warm_up=2")),
        *("--config.train.steps=140", "--config.train.log_every=70"),
        *("--config.train.evaluate_every=0", "--config.train.checkpoint_every=0"),
        *("--config.optimizer.name=adamw", "--config.sample.num_samples=1"),
    ]
    records = {}
    for count, mesh in ((1, "data=1"), (2, "data=1,fsdp=2")):
        workdir = tmp_path / str(count)
        line = (*own, f"--config.mesh={mesh}", f"--workdir={workdir}")
        done = launching.finish_several(launching.start_several(count, *line))
        assert all(code == 0 for code, _, _ in done), done
        assert "variance.order=auto at step 0:" in done[0][1]
        assert "variance.order=auto" not in "".join(out + err for _, out, err in done[1:])
        (records[count],) = map(json.loads, (workdir / "auto.jsonl").read_text().splitlines())
    one, two = records[1], records[2]
    assert one["chain"] == two["chain"] and one["passes"] == two["passes"] > 1000
    for name, figure in one["chains"].items():
        found = two["chains"][name]["group_variances"]
        np.testing.assert_allclose(found, figure["group_variances"], rtol=2e-3)


@pytest.mark.slow
def test_two_processes_evaluate_and_sample_as_one(whole, tmp_path):
    """Rows over both, halves of every parameter in each."""
    found = {}
    for count, mesh in ((1, "data=1"), (2, "data=1,fsdp=2")):
        workdir = shutil.copytree(whole, tmp_path / str(count))
        shutil.rmtree(workdir / "samples")
        line = (f"--workdir={workdir}", f"--config.mesh={mesh}", "--allow_config_change")
        for mode in (["--mode=evaluate"], ["--mode=sample", "--n=3", "--prompt=The "]):
            done = launching.finish_several(launching.start_several(count, *mode, *line))
            assert all(code == 0 for code, _, _ in done), done
            assert not any("written" in out or "test:" in out for _, out, _ in done[1:])
        (records,) = (workdir / "samples").glob("*.jsonl")
        evaluation = json.loads((workdir / "evaluation.json").read_text())
        found[count] = records.read_text(), evaluation
    assert found[1][0] == found[2][0] and len(found[1][0].splitlines()) == 3
    for name, value in found[1][1].items():
        if isinstance(value, float):
            np.testing.assert_allclose(found[2][1][name], value, rtol=1e-5)
        elif name not in ("levels",):
            assert found[2][1][name] == value, name


def goes_on(out):
    """After a kill at step 9. A save waits for the one before, so that of step 4 is whole then;
    that of step 8 need not be."""
    return "resuming at step 4" in out or "resuming at step 8" in out


def kill_first(started):
    started[0].send_signal(signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("killed,then", [(0, kill_first), (1, kill_second)])
def test_a_process_that_dies_ends_the_others_with_a_word(whole, tmp_path, killed, then):
    workdir = tmp_path / "run"
    found = stop_at(workdir, 9, then, 2)
    assert found[killed][0] == -signal.SIGKILL and found[1 - killed][0] not in (0, 130)
    word = "process 0 has ended, so process 1 ends" if killed == 0 else "error: process 0 ends"
    assert word in found[1 - killed][2]
    assert goes_on(finish(workdir, 2))
    assert_same_run(workdir, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "before,after,devices,then,mesh",
    [
        (2, 1, 2, kill_all, "data=2,fsdp=2"),
        (4, 2, 1, kill_all, "data=2,fsdp=2"),
        (4, 2, 2, kill_second, "data=2,fsdp=2,tensor=2"),
    ],
)
def test_killed_runs_go_on_with_other_processes(
    whole, tmp_path, before, after, devices, then, mesh
):
    workdir = tmp_path / "run"
    found = stop_at(workdir, 9, then, before, f"--config.mesh={mesh}", devices=devices)
    assert all(code not in (0, 130) for code, _, _ in found)
    out = finish(workdir, after, devices=devices)
    assert goes_on(out)
    assert_same_run(workdir, whole)


@pytest.mark.slow
def test_one_process_goes_on_as_two(whole, tmp_path):
    workdir = tmp_path / "run"
    process = launching.start(*ARGUMENTS, f"--workdir={workdir}")
    for line in process.stderr:
        if f"step 9/{STEPS} " in line:
            process.kill()
            break
    launching.finish_several([process])
    assert goes_on(finish(workdir, 2))
    assert_same_run(workdir, whole)


@pytest.mark.slow
def test_processes_go_on_from_a_model_of_others_and_export_it(tmp_path):
    """Each reads and writes its own shards; as one process with as many devices."""
    pairs = ({"prompt": f"{i}+1", "answer": f"{i + 1} yes"} for i in range(40))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    line = [
        "--config=finetune:smoke",
        f"--config.model.source={launching.ROOT / 'tests/data/hub/a2d_qwen3-1'}",
        "--config.data.source=jsonl",
        f"--config.data.path={tmp_path / 'pairs.jsonl'}",
        *("--config.data.prompt_length=8", "--config.data.answer_length=8"),
        "--config.data.fractions=(0.6, 0.2, 0.2)",
        *("--config.optimizer.peak=0.001", "--config.optimizer.warmup_steps=1"),
        "--config.mesh=data=2,fsdp=4",
    ]
    tensors = {}
    for count, devices in ((1, 8), (2, 4)):
        workdir = f"--workdir={tmp_path / f'run{count}'}"
        for more in (["--config.train.steps=2"], ["--allow_config_change"]):  # resumed
            started = launching.start_several(count, *line, workdir, *more, devices=devices)
            done = launching.finish_several(started)
            assert all(code == 0 for code, _, _ in done), done
        assert "resuming at step 2" in done[0][1]
        for exporting in {1, count}:
            target = tmp_path / f"out{count}-{exporting}"
            arguments = ("--mode=export", workdir, f"--to={target}", "--parameters=last")
            done = launching.finish_several(
                launching.start_several(exporting, *arguments, devices=8 // exporting)
            )
            assert all(code == 0 for code, _, _ in done), done
            files = TensorFiles(target)
            tensors[count, exporting] = {name: files.read(name) for name in files.shapes}
            assert (target / "tokenizer.json").exists()
    chex.assert_trees_all_equal(tensors[2, 1], tensors[2, 2])
    for name, value in tensors[1, 1].items():
        np.testing.assert_allclose(tensors[2, 2][name], value, rtol=0, atol=2e-5)


# --- starting -----------------------------------------------------------------------------------


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "2",
}


@pytest.mark.parametrize(
    "environment,kind",
    [
        ({}, None),
        (SLURM, "Slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({k: v for k, v in SLURM.items() if k != "SLURM_PROCID"}, None),  # a shell, not a task
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, "TPU slice"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, "multislice"),
        ({"KUBERNETES_SERVICE_HOST": "a", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        ({"KUBERNETES_SERVICE_HOST": "a"}, None),
    ],
)
def test_clusters_are_told_from_workstations(environment, kind):
    found = command_line.detected({"JAX_PLATFORMS": "cpu", **environment})
    assert (found is None) if kind is None else kind in found


def test_half_given_coordinates_are_refused(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", pytest.fail)
    with pytest.raises(ValueError, match="--coordinator_address is missing"):
        command_line.start_processes(None, 2, 0)
    with pytest.raises(ValueError, match=r"--process_id must be in \[0, 2\)"):
        command_line.start_processes("localhost:1", 2, 2)
    for address in ("notaport", "localhost:", ":12", "a b:12", "localhost:x", "a:0", "a:65536"):
        with pytest.raises(ValueError, match=f"--coordinator_address={address}: give HOST:PORT"):
            command_line.start_processes(address, 2, 1)
    for address in ("localhost:1", "10.0.0.1:65535", "[fe80::1%eth0]:1234", "node-1.lab:80"):
        command_line._check_address(address)
    command_line.start_processes(None, None, None)  # a workstation
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    command_line.start_processes(None, 1, None)  # told not to look


@pytest.fixture
def first():
    """A coordinator that greets whoever comes: (its socket, HOST:PORT)."""
    with socket.create_server(("localhost", 0)) as server:
        yield server, f"localhost:{server.getsockname()[1]}"


def test_the_companion_says_who_is_waited_for_and_that_process_0_has_ended(capfd, first):
    server, address = first
    nobody = f"localhost:{launching.free_port()}"
    tell = command_line._start_companion(nobody, 2, 1, pause=0.1)
    expected = f"process 1 waits for process 0, which does not answer at {nobody} (Connection ref"
    assert expected in said(capfd)
    tell(address)  # all have joined
    for _ in range(2):  # is process 0 within reach? then: it is alive
        connection, _ = server.accept()
        connection.send(b"greeting")
    assert capfd.readouterr().err.count("error") == 0
    connection.close()
    assert "error: process 0 has ended, so process 1 ends" in said(capfd)
    tell = command_line._start_companion(None, 3, 0, pause=0.1)
    assert "process 0 waits for the others; start all 3 processes" in said(capfd)
    tell("")


def test_the_companion_leaves_without_a_word(capfd, first):
    server, address = first
    tell = command_line._start_companion(address, 2, 1)
    tell(address)
    for _ in range(2):
        connection, _ = server.accept()
        connection.send(b"greeting")
    tell("end")
    connection.settimeout(20)
    assert connection.recv(1) == b"" and capfd.readouterr().err == ""


def said(capfd):
    """What came on standard error, at the latest after 20 s."""
    for _ in range(400):
        if text := capfd.readouterr().err:
            return text
        time.sleep(0.05)
    raise AssertionError("nothing was said")


class Store(dict):
    """The coordination service's keys, set by processes that ran before."""

    key_value_set = dict.__setitem__

    def blocking_key_value_get(self, key, _):
        return self[key]


@pytest.mark.parametrize("steps", [4, 5])
def test_settings_are_compared_before_anything_is_built(monkeypatch, steps):
    store = Store({"mdm_jax/settings/2": json.dumps({"train": {"steps": steps}})})
    store["mdm_jax/settings/1"] = json.dumps({"train": {"steps": 4}})
    for me in range(3):  # every process says the same
        state = types.SimpleNamespace(client=store, process_id=me, num_processes=3)
        monkeypatch.setattr(command_line, "global_state", state)
        settings = {"train": {"steps": steps if me == 2 else 4}}
        if steps == 4:
            command_line.check_same(settings)
            continue
        with pytest.raises(ValueError, match=r"process 2 has .*\n  train.steps: 4 -> 5"):
            command_line.check_same(settings)


@pytest.mark.slow
def test_processes_with_other_settings_end_at_once(tmp_path):
    together = (*ARGUMENTS, f"--workdir={tmp_path / 'run'}", "--num_processes=2")
    together = (*together, f"--coordinator_address=localhost:{launching.free_port()}")
    started = [
        launching.start(*together, f"--process_id={number}", f"--config.seed={number}")
        for number in range(2)
    ]
    for code, _, err in launching.finish_several(started):
        assert code == 2 and "config.seed: 0 -> 1" in err and "Check failure" not in err
    assert not (tmp_path / "run").exists()
