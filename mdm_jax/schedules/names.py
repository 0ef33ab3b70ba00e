"""What a wrong schedule name is answered with: near names, or the world that the name lives in."""

import difflib


def unknown_schedule(name: str, world: str) -> ValueError:
    """The error for a name that the registry of ``world``, "masked" or "Gaussian", does not hold.

    A curve of the other world is not handed out under its name: the two use "cosine", "linear" and
    alpha for different things.
    """
    # Each registry's by_name uses this function, so neither can be imported above.
    from mdm_jax.schedules import gaussian, masked

    registries = {
        "masked": ("masked", masked.MASKED_SCHEDULES),
        "Gaussian": ("gaussian", gaussian.GAUSSIAN_SCHEDULES),
    }
    _, known = registries.pop(world)
    ((other, (module, foreign)),) = registries.items()
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    message = f"unknown {world} schedule {name!r}; "
    if name in foreign:
        message += f"{name!r} is a {other} schedule, schedules.{module}.{name}; "
    if near:
        message += f"did you mean {' or '.join(near)}? "
    return ValueError(f"{message}known: {', '.join(sorted(known))}")
