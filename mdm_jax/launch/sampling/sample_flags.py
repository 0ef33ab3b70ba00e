"""The flags of ``mdm sample``; imported by the command alone."""

import sys
from collections.abc import Callable, Mapping

from absl import flags

from mdm_jax import files
from mdm_jax.launch.sampling import released as models
from mdm_jax.launch.sampling.marks import in_colour
from mdm_jax.launch.sampling.options import Options
from mdm_jax.launch.sampling.requests import make_request

_PROMPT = flags.DEFINE_string("prompt", None, "sample: a text to continue, or to answer.")
_INFILL = flags.DEFINE_string(
    "infill",
    None,
    "sample: a text with places to fill, ▁▁5 of five tokens, ▁▁ of as many as fit; a ▁ that is "
    "text is written \\▁. Behind --prompt, if that is given too.",
)
_PROMPTS = flags.DEFINE_string(
    "prompts",
    None,
    "sample: file of JSON lines, texts or objects with prompt, infill, length; or of texts, one a "
    "line, ▁ for each token to write.",
)
_COUNT = flags.DEFINE_integer("n", None, "sample: samples, or of each prompt.", 1)
_LENGTH = flags.DEFINE_integer(
    "length", None, "sample: tokens to write, or of each ▁▁ without a number; else what fits.", 1
)
_SEED = flags.DEFINE_integer("seed", None, "sample: of the noise; else the run's.", 0, 2**32 - 1)
_LIVE = flags.DEFINE_bool("live", False, "sample: show texts in the making.")
_GIF = flags.DEFINE_string("gif", "", "sample: new file for a film of the decoding.")


def read() -> Options:
    """The flags of the command line; ValueError for a request that means nothing."""
    requests, own = (), "config.sample.prompts"
    words = [flag for flag in (_PROMPT, _INFILL) if flag.value is not None]
    paths = [_PROMPTS.value] * bool(_PROMPTS.value)
    paths += [own] * (own in flags.FLAGS and bool(flags.FLAGS[own].present))
    if len(paths) + bool(words) > 1:
        raise ValueError(
            "--prompt and --infill, or --prompts, or --config.sample.prompts: give one of them"
        )
    if _PROMPT.value is not None or _INFILL.value is not None:
        named = {"--prompt": _PROMPT.value, "--infill": _INFILL.value}
        origin = " ".join(name for name, text in named.items() if text is not None)
        requests = (make_request(origin, _PROMPT.value, _INFILL.value, _LENGTH.value),)
    options = (_COUNT.value, _LENGTH.value, _SEED.value, _LIVE.value, _GIF.value)
    return Options(requests, _PROMPTS.value or "", *options, in_colour(sys.stdout))


def released(
    workdir: files.Path | None,
    source: str,
    own: Mapping[str, flags.FlagHolder],
    show: Callable[[str], None],
) -> int:
    """Samples of a model of others, by its name and the flags that are given of ``own``."""
    if workdir is not None:
        raise ValueError("sample from a run, --workdir=RUN, or a model, --source=DIR, not both")
    given = {name: flag.value for name, flag in own.items() if flag.present}
    models.sample(source, read(), **given, show=show)
    return 0
