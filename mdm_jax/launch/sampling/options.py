"""What is asked of ``mdm sample`` besides the config, and the rows for it."""

from typing import NamedTuple

import jax

from mdm_jax.launch.build import Experiment
from mdm_jax.launch.modes.sample import (
    Job,
    file_requests,
    make_jobs,
    order,
    pictures,
    request_jobs,
)
from mdm_jax.launch.sampling.requests import Request, check_known, rows_of
from mdm_jax.launch.sampling.watch import Watcher


class Options(NamedTuple):
    """What is asked of ``mdm sample`` besides the config.

    ``requests``, or those of the file ``prompts``, in place of the config's; ``count`` samples of
    each, or of a text from nothing; ``length``: as of ``requests.Request``; ``seed``: None for the
    run's; ``live``, ``gif``: as of ``watch.Watcher``; ``colour``: generated text is shown so.
    """

    requests: tuple[Request, ...] = ()
    prompts: str = ""
    count: int | None = None
    length: int | None = None
    seed: int | None = None
    live: bool = False
    gif: str = ""
    colour: bool = False


def rows_and_watcher(
    experiment: Experiment, asked: Options
) -> tuple[tuple[Job, ...], Watcher | None]:
    """The rows to write, and who watches; ValueError for what the run cannot write."""
    watcher = None
    if asked.live or asked.gif:
        if jax.process_count() > 1:
            raise ValueError("--live and --gif take one process; start it with --num_processes=1")
        d = experiment.dataset
        watcher = Watcher(d.tokenizer, d.mask_id, asked.live, asked.gif, d.event_shape)
    return _jobs(experiment, asked), watcher


def _jobs(experiment: Experiment, asked: Options) -> tuple[Job, ...]:
    c, dataset, length = experiment.config.sample, experiment.dataset, asked.length
    own, requests = order(experiment.config), list(asked.requests)
    if dataset.tokenizer is None and (requests or asked.prompts or length):
        raise ValueError(
            "--prompt, --infill, --prompts and --length are about text, and this run's data are "
            "pictures; --n says how many, --config.sample.classes of what, where the model knows"
        )
    for request in requests:
        check_known(request, dataset.tokenizer)
    if asked.prompts:
        requests = file_requests(asked.prompts, dataset.tokenizer, length)
    elif c.prompts and not requests and (length or asked.count):
        requests = file_requests(c.prompts, dataset.tokenizer, length)
    elif length and not requests:
        if dataset.layout is not None:
            raise ValueError("--length: rows of this run have a prompt; give --prompt too")
        texts = asked.count or c.num_samples
        requests = [Request(rest=True, length=length, origin="--length")]
        return request_jobs(requests, rows_of(dataset, **own), texts)
    if requests:
        seed = experiment.config.seed if asked.seed is None else asked.seed
        return request_jobs(requests, rows_of(dataset, **own), asked.count or 1, seed)
    if asked.count is None:
        return experiment.jobs
    options = {"num_samples": asked.count, "gap": 0, "prompts": ""}
    own |= pictures(experiment.config, dataset)
    return make_jobs(dataset, experiment.held_out[1], **options, **own)
