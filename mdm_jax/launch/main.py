"""The modes of the command ``mdm``, whose help is in :mod:`mdm_jax.launch.__main__`."""

import contextlib
import functools
import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from mdm_jax import distributed, files, hub
from mdm_jax.data.tokenizers import printable
from mdm_jax.launch import HELP_FLAG, command_line, presets
from mdm_jax.launch import source as sources
from mdm_jax.launch.ahead import command as ahead
from mdm_jax.launch.alignment import variance as aligned_variance
from mdm_jax.launch.auto import fit
from mdm_jax.launch.build import Experiment, make_experiment
from mdm_jax.launch.modes import chat, eval_tasks, evaluate, measure, preview, sweep, train
from mdm_jax.launch.modes import export as exports
from mdm_jax.launch.reports import page, settings
from mdm_jax.launch.reports.curves import is_exact
from mdm_jax.launch.sampling import sample_flags
from mdm_jax.launch.sampling.quality import own_steps
from mdm_jax.launch.spacing import compare
from mdm_jax.launch.start import accelerators, scaled
from mdm_jax.launch.start import new as new_config
from mdm_jax.launch.tune import command as tune
from mdm_jax.launch.workdir import (
    WorkdirError,
    check,
    claim,
    command,
    read_config,
    resolved,
    saved_config,
    saved_nothing,
    training_lock,
)
from mdm_jax.training.checkpoints import CheckpointError
from mdm_jax.training.loop import Interrupt, Interrupted, TrainingStopped

_ARGUMENTS: list[str] = []
"""The command line as typed."""
_PARSED: list[str] = []
"""The command line as :func:`command_line.with_config` leaves it."""

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config: a built-in one, as in quickstart:smoke, or a file.",
    sys_argv=_PARSED,
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; made if missing.")
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    command_line.MODES,
    "What to do; train ends with a report, variance measures methods on a trained or fresh model.",
)
_ALLOW = flags.DEFINE_bool(
    "allow_config_change", False, "Go on in a workdir whose run has another config."
)
_RESTART = flags.DEFINE_bool(
    "restart", False, "Start anew in a workdir with a run; what that left is kept as *.1.* etc."
)
_TO = flags.DEFINE_string(
    "to",
    None,
    "export: directory to write, new or empty; eval: of results; compile: file of figures.",
)
_PARAMETERS = flags.DEFINE_enum(
    "parameters", "ema", ("ema", "last"), "export, chat, eval: averages, or as of the last step."
)
_DTYPE = flags.DEFINE_string("dtype", None, "export, eval --source: else as stored.")
_ADAPTER = flags.DEFINE_bool(
    "adapter", False, "export: the adapters alone, as a directory of PEFT; else merged."
)
_SOURCE = flags.DEFINE_string("source", None, "chat, eval, sample: directory or id of a model.")
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", None, "chat, eval: longest answer; else 128, or what the length leaves.", 1
)
_STEPS = flags.DEFINE_integer(
    "answer_steps", None, "chat, eval, as --steps: of an answer; else one a token.", 1
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "chat, eval: 0: the likeliest tokens; sample: the config's.", 0.0
)
_TEMPLATE = flags.DEFINE_bool(
    "template",
    None,
    "chat, eval: by the model's chat template; else each line is a prompt of its own. "
    "In chats by default with --source, and with --workdir if its data are chats.",
)
_OVER = flags.DEFINE_string(
    "over", None, 'sweep: settings and their values, "seed=0,1,2;optimizer.peak=1e-3,3e-3".'
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "Several processes: HOST:PORT of process 0, the same for all."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Several processes: how many; 1 does not look for a cluster.", 1
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Several processes: number of this one, from 0.", 0
)
_CACHE = flags.DEFINE_string(
    "compilation_cache_dir",
    None,
    "Where compiled programs are kept for the next start; by default below ~/.cache/mdm_jax, or "
    "$JAX_COMPILATION_CACHE_DIR; '' for no cache.",
)
_STARTED = time.monotonic()

_USER_ERRORS = (
    ValueError,
    OSError,
    ImportError,
    MemoryError,  # with advice, from compiling the step
    WorkdirError,
    CheckpointError,
    TrainingStopped,
)
_print = functools.partial(print, flush=True)
_FLAGS_OF = {
    new_config.__name__: "new",
    ahead.__name__: "compile",
    fit.__name__: "variance",
    sample_flags.__name__: "sample",
    tune.__name__: "tune-levels",
}
_STOPPED = 130  # what shells report after Ctrl-C


def main(argv: list[str]) -> int:
    """Run one mode; returns the exit status."""
    if unread := command_line.unread_flag(_FLAGS_OF, _MODE.value):
        return _fail(unread)
    if _MODE.value == "config":
        return _config(argv[1:])
    if _MODE.value == "new":
        return _answered(_new, argv[1:])
    if len(argv) > 1:
        return _fail(
            f"unexpected arguments {argv[1:]}; settings are written --config.name=value, and the "
            f"first word is one of {', '.join(command_line.MODES)}"
        )
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax logs every save
    alone = _SOURCE.value or eval_tasks.comparing()
    if _MODE.value == "compile":  # for other machines than this one
        return _answered(_compile)
    if _WORKDIR.value is None and not (_MODE.value in ("chat", "eval", "sample") and alone):
        return _fail("--workdir is required: the directory of the run, made if missing")
    if _CONFIG.value is None and _WORKDIR.value is not None:
        return _fail("--config is required to train, as in --config=quickstart")
    if _RESTART.value and _MODE.value != "train":
        return _fail("--restart is for --mode=train")
    if _MODE.value == "sweep":  # before anything starts devices, which are its runs'
        return _answered(_sweep)
    if _MODE.value == "tune-levels":
        command_line.use_compilation_cache(_CACHE.value)
        return _answered(tune.run, _CONFIG.value, files.as_path(_WORKDIR.value), _ARGUMENTS, _print)
    cluster = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    try:
        workdir = _WORKDIR.value and files.as_path(_WORKDIR.value)
        command_line.use_compilation_cache(_CACHE.value)
        farewell = command_line.start_processes(*cluster)
        if jax.distributed.is_initialized():
            command_line.check_same(_settings())
    except (ValueError, RuntimeError) as error:
        code = _fail(str(error))
        return command_line.leave(code) if jax.distributed.is_initialized() else code
    if jax.process_count() > 1:
        code = _run_as_one_of_several(workdir)
        farewell()
        return code
    try:
        return _run(workdir)
    except KeyboardInterrupt:
        return _stopped_at_once()


def _run(workdir: files.Path) -> int:
    try:
        if _MODE.value == "sample" and _SOURCE.value:
            own = {"steps": _STEPS, "temperature": _TEMPERATURE, "templated": _TEMPLATE, "to": _TO}
            return sample_flags.released(workdir, _SOURCE.value, own, show=_print)
        if _MODE.value in _MODEL_MODES:
            _check_overrides()
            return _MODEL_MODES[_MODE.value](workdir)
        try:
            training = _MODE.value == "train"
            free = training and saved_nothing(workdir)
            begun = None if free or _RESTART.value else workdir
            source = sources.read(_CONFIG.value, begun)
            given = command_line.overridden(_PARSED)
            config = sources.filled(_CONFIG.value, source, given, begun)
            config = scaled.filled(config, begun and read_config(begun))
            check(workdir, config, _ALLOW.value or free)
            experiment = make_experiment(config, begun, given)
        except TypeError as error:
            raise ValueError(str(error)) from error  # a setting of the wrong kind
        return _MODES[_MODE.value](experiment, workdir)
    except _USER_ERRORS as error:
        logging.debug("where it came from:", exc_info=True)
        nameless = isinstance(error, OSError) and error.filename is None
        return _fail(f"{workdir}: {error}" if nameless else str(error))


def _run_as_one_of_several(workdir: files.Path) -> int:
    """As :func:`_run`; only process 0 prints, and a failing process ends the others too."""
    alone = _MODE.value in ("variance", "spacing", "chat", "report")
    if alone or (_MODE.value == "sample" and _SOURCE.value) or eval_tasks.comparing():
        return _fail(f"--mode={_MODE.value} runs in one process; start it with --num_processes=1")
    try:
        with contextlib.ExitStack() as stack:
            if jax.process_index():
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            code = _run(workdir)
    except KeyboardInterrupt:
        command_line.leave(_stopped_at_once())
    except BaseException as error:
        logging.debug("where it came from:", exc_info=True)
        code = _fail(str(error))
    if code not in (0, _STOPPED):
        _fail(f"process {jax.process_index()} ends; the first to end says why")
        command_line.leave(code)
    return code


def _settings() -> dict[str, Any]:
    """What all processes of a run must have in common: not the names of places on their disks."""
    by_module = flags.FLAGS.flags_by_module_dict()
    modules = (__name__, eval_tasks.__name__, sample_flags.__name__)
    given = {flag.name: flag.value for module in modules for flag in by_module[module]}
    for own in ("process_id", "workdir", "to", "compilation_cache_dir", "coordinator_address"):
        del given[own]
    return given | {"config": _CONFIG.value and resolved(_CONFIG.value)}


def _train(experiment: Experiment, workdir: files.Path) -> int:
    if warning := accelerators.unused_accelerator(os.environ):
        print(f"warning: {warning}", file=sys.stderr)
    print(experiment.describe(), scaled.describe(experiment.config), sep="\n", flush=True)
    if hint := accelerators.unused_bfloat16(experiment.config.model.dtype):
        print(f"hint: {hint}", flush=True)
    print(preview.preview(experiment.dataset), flush=True)
    with Interrupt() as interrupt:
        try:
            if train.train(experiment, workdir, interrupt, _ALLOW.value, _STARTED, _RESTART.value):
                evaluate.report(experiment, workdir, interrupt.check, show=_print)
                return 0
        except Interrupted:
            pass  # during the final evaluation; training itself is saved
    print(
        f"stopped and saved in {workdir}; the same command line resumes:\n  {command(_ARGUMENTS)}"
    )
    return _STOPPED


def _evaluate(experiment: Experiment, workdir: files.Path) -> int:
    _claim(experiment, workdir)

    def show(record: dict[str, Any]) -> None:
        error = record["standard_error_bits_per_unit"]
        exact, shown = is_exact(experiment.config), "unknown" if error is None else f"{error:.4f}"
        value = f"{record['bits_per_unit']:.4f}{'' if exact else f' ± {shown}'}"
        result = f"{record['split']}: {value} bits per {record['unit']}"
        _print("\n".join([result, *evaluate.details(experiment, record)]))

    evaluate.evaluate(experiment, workdir, show=show)
    print(f"all numbers in {workdir / 'evaluation.json'}")
    return 0


def _sample(experiment: Experiment, workdir: files.Path) -> int:
    if "sample.num_steps" in command_line.overridden(_PARSED) and not experiment.family.takes_steps:
        raise ValueError(f"--steps: {own_steps(experiment.config)}")
    _claim(experiment, workdir)
    drawn = evaluate.sample(experiment, workdir, _print, asked=sample_flags.read())
    print(f"written to {', '.join(drawn['files'])}")
    return 0


def _spacing(experiment: Experiment, workdir: files.Path) -> int:
    found = compare.compare(experiment, workdir, show=_print)
    print(f"written to {', '.join(found['files'])}")
    last, grid = found["records"][-1], experiment.config.sample.grid
    line = ["mdm", "sample", f"--workdir={workdir}", f"--steps={last['num_steps']}"]
    line += [f"--config.sample.sampler={last['sampler']}", *["--config.sample.grid="] * bool(grid)]
    print(f"{shlex.join(line)} takes the best, {last['best']!r}")
    return 0


def _variance(experiment: Experiment, workdir: files.Path) -> int:
    of_run = aligned_variance if experiment.config.alignment.method else measure
    run = fit.fit if fit.FIT.value else of_run.configured(experiment)
    _claim(experiment, workdir, always=True)
    print(f"written to {', '.join(run(experiment, workdir, _print))}")
    return 0


def _claim(experiment: Experiment, workdir: files.Path, always: bool = False) -> None:
    """Make the workdir that of a run, if it is new and has a source (or ``always``)."""
    new = read_config(workdir) is None
    if not (always and (new or _ALLOW.value)) and not (new and experiment.source is not None):
        return
    with training_lock(workdir):
        if distributed.is_first():
            claim(workdir, experiment.config, _ALLOW.value)
        sources.keep(experiment.config, experiment.source, workdir)
    distributed.barrier("directory claimed")


def _check_overrides() -> None:
    """Raise ValueError for settings that a mode without data does not read."""
    reads = {
        "chat": ("mesh.fsdp", "mesh.tensor", "mesh.data", "model.source"),
        "eval": ("mesh.fsdp", "mesh.tensor", "mesh.data", "model.source"),
        "export": ("model.source",),
    }.get(_MODE.value, ())
    unread = [name for name in command_line.overridden(_PARSED) if name not in reads]
    if unread:
        raise ValueError(
            f"--mode={_MODE.value} does not read --config.{unread[0]}; its flags are in mdm --help"
        )


def _moved() -> str | None:
    """Where the source of a run is now, if the command line says so."""
    given = "model.source" in command_line.overridden(_PARSED)
    return _CONFIG.value.model.source if given else None


def _export(workdir: files.Path) -> int:
    if _TO.value is None:
        return _fail("--to is required: the directory to write, new or empty")
    step, layout = exports.export(
        workdir, _TO.value, _PARAMETERS.value == "last", _DTYPE.value, _ADAPTER.value, _moved()
    )
    print(f"step {step} written to {_TO.value} in the layout of {layout}")
    return 0


def _chat(workdir: files.Path | None) -> int:
    if (workdir is None) == (_SOURCE.value is None):
        return _fail("chat with a run, --workdir=RUN, or with a model, --source=DIR, not both")
    if workdir is None:
        model = hub.load(_SOURCE.value)
    else:
        given = any(name.startswith("mesh.") for name in command_line.overridden(_PARSED))
        mesh = exports.chat_mesh(_CONFIG.value, given)
        run = exports.open_run(workdir, _PARAMETERS.value == "last", mesh=mesh, moved=_moved())
        model = exports.merged(run, workdir)
    saved = None if workdir is None else saved_config(workdir)
    templated = _TEMPLATE.value
    if templated is None:
        templated = saved is None or saved.data.source == "chat"
    chat.chat(
        model,
        chat.tokenizer_of(model, workdir),
        max_tokens=_MAX_TOKENS.value,
        steps=_STEPS.value,
        temperature=_TEMPERATURE.value,
        templated=templated,
        trained_here=saved is not None,
        window=saved.block.window if saved is not None and saved.process == "block" else 0,
    )
    return 0


def _eval(workdir: files.Path | None) -> int:
    if workdir is not None and _SOURCE.value is not None:
        return _fail("evaluate a run, --workdir=RUN, or a model, --source=DIR, not both")
    own = {"max_tokens": _MAX_TOKENS, "steps": _STEPS, "temperature": _TEMPERATURE}
    return eval_tasks.run(
        workdir,
        _SOURCE.value,
        _CONFIG.value,
        _TO.value,
        last=_PARAMETERS.value == "last",
        template=_TEMPLATE.value,
        dtype=_DTYPE.value,
        moved=_moved(),
        given={name: flag.value for name, flag in own.items() if flag.present},
        show=_print,
    )


def _sweep() -> int:
    """Runs are given the command line as typed, but for what only concerns the sweep."""
    rest = command_line.without(_ARGUMENTS[1:], ("mode", "workdir", "over"))
    rest = rest[1:] if rest[:1] == ["sweep"] else rest
    runs = sweep.plan(_CONFIG.value, _OVER.value or "")
    for name in runs[0].settings:
        if name in command_line.overridden(_PARSED):
            raise ValueError(f"--config.{name} is also swept over; give it in one place")
    started = [sys.executable, "-m", "mdm_jax.launch", "train", *rest]
    code = sweep.sweep(runs, files.as_path(_WORKDIR.value), started, show=_print)
    if code == _STOPPED:
        print(f"stopped and saved; the same command line resumes:\n  {command(_ARGUMENTS)}")
    return code


def _compile() -> int:
    if _CONFIG.value is None:
        return _fail("--config is required, as in --config=quickstart, or --workdir of a run")
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")  # what is here is not used
    return ahead.run(_CONFIG.value, _TO.value, show=_print)


def _report(workdir: files.Path) -> int:
    print(f"written to {page.write_page(workdir)}")
    return 0


_MODEL_MODES = {"export": _export, "chat": _chat, "eval": _eval, "report": _report}
_MODES = {
    "train": _train,
    "evaluate": _evaluate,
    "sample": _sample,
    "spacing": _spacing,
    "variance": _variance,
}


def _config(groups: list[str]) -> int:
    if _CONFIG.value is None:
        return _fail(
            "config needs a name, a file or a --workdir, as in mdm config quickstart; built in "
            f"are {', '.join(presets.PRESETS)}"
        )
    try:
        for group in groups:
            command_line.check_field(_CONFIG.value, group)
    except command_line.CommandLineError as error:
        return _fail(str(error))
    print(settings.listing(_CONFIG.value, command_line.config_name(_PARSED), groups))
    return 0


def _parse(argv: list[str]) -> list[str]:
    _ARGUMENTS[:] = argv
    if any(re.fullmatch("--?help(full|xml)", each) for each in argv[1:]):
        with contextlib.suppress(SystemExit):
            app.parse_flags_with_usage([argv[0], "--helpfull"])
        sys.exit(0)
    if any(map(HELP_FLAG.fullmatch, argv[1:])):
        argv = command_line.listing_instead(argv)
    try:
        _PARSED[:] = command_line.with_config(argv)
    except (command_line.CommandLineError, WorkdirError) as error:
        sys.exit(_fail(str(error)))
    except flags.Error:
        _PARSED[:] = argv  # absl reports it below
    return app.parse_flags_with_usage([*_PARSED])


def _new(kinds: list[str]) -> int:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # JAX logs its search for devices
    command_line.use_compilation_cache(_CACHE.value)
    new_config.run(kinds, _print)
    return 0


def _answered(mode: Callable[..., int], *arguments: Any) -> int:
    """The exit status of a mode without a run; errors of users are one line."""
    try:
        return mode(*arguments)
    except (*_USER_ERRORS, TypeError) as error:
        logging.debug("where it came from:", exc_info=True)
        return _fail(str(error))
    except KeyboardInterrupt:
        return _stopped_at_once()


def _stopped_at_once() -> int:
    print("\nstopped at once; what was saved before is whole", file=sys.stderr)
    return _STOPPED


def _fail(message: str) -> int:
    print(f"error: {printable(message)}", file=sys.stderr)
    return 2


def run() -> None:
    """Run the command line of this process."""
    app.run(main, flags_parser=_parse)
