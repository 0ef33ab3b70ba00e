"""The masked schedules of the literature, by name.

Two different curves are called "cosine" in public code, mirror images of each other; here each
carries the name of those who use it. "loglinear" is the linear masking rate: only its integrated
noise ``sigma = -log(1 - m)`` is a logarithm.

Every factory checks its parameters (traced ones are left alone) and stands in
:data:`MASKED_SCHEDULES` under its own name. Time t runs from 0, clean, to 1.
"""

from collections.abc import Callable

from mdm_jax.schedules import masked_curves as curves
from mdm_jax.schedules.masked_schedule import MaskedSchedule
from mdm_jax.schedules.names import unknown_schedule
from mdm_jax.schedules.parameters import as_parameter, check_finite, check_interval, is_concrete
from mdm_jax.typing import ArrayLike


def linear() -> MaskedSchedule:
    """m = t, a uniform masking rate. Weight 1/t."""
    return curves.Clipped(0.0, 0.0)


def loglinear(eps: ArrayLike = 1e-3) -> MaskedSchedule:
    """m = (1 - eps) t: linear, stopping short of rate 1. SEDD, RADD, MDLM, BD3-LM and Duo.

    Raises:
        ValueError: unless 0 <= eps < 1.
    """
    eps = as_parameter(eps, "eps")
    if is_concrete(eps) and not 0 <= eps < 1:
        raise ValueError(f"loglinear needs 0 <= eps < 1, got {eps}")
    return curves.Clipped(0.0, eps)


def clipped(low: ArrayLike, high: ArrayLike) -> MaskedSchedule:
    """m uniform on [low, high]. BD3-LM's clipped rates; (eps, 1) is that of LLaDA and SMDM.

    The weight (high - low)/m estimates the integral over [low, high]; public code that uses 1/m
    estimates the average instead.

    Raises:
        ValueError: unless 0 <= low < high <= 1.
    """
    low, high = _rates("clipped", low, high)
    return curves.Clipped(low, 1 - high)


def cosine_md4() -> MaskedSchedule:
    """m = sin(pi t / 2), survival 1 - cos(pi (1 - t) / 2). "cosine" in MD4, dllm and Duo.

    Weight (pi/2) cot(pi t / 2). Mirror image of :func:`cosine_mdlm` in time and sign of the logSNR.
    """
    return curves.CosineMD4()


def cosine_mdlm() -> MaskedSchedule:
    """m = 1 - cos(pi t / 2). "cosine" in MDLM and BD3-LM. Weight (pi/2) cot(pi t / 4)."""
    return curves.CosineMDLM()


def cosine_squared() -> MaskedSchedule:
    """m = sin(pi t / 2)^2, symmetric; density sech(logsnr / 2) / (2 pi). Weight pi cot(pi t / 2).

    The same law of the logSNR as the variance-preserving Gaussian cosine schedule.
    """
    return curves.CosineSquared()


def power(exponent: ArrayLike) -> MaskedSchedule:
    """m = t^exponent. Weight exponent/t. An exponent above 1 visits small rates more often.

    Raises:
        ValueError: unless the exponent is positive and finite.
    """
    exponent = as_parameter(exponent, "exponent")
    check_finite("power", exponent=exponent)
    if is_concrete(exponent) and not exponent > 0:
        raise ValueError(f"power needs exponent > 0, got {exponent}")
    return curves.Power(exponent)


def sqrt() -> MaskedSchedule:
    """m = t^(1/2). Weight 1/(2t)."""
    return curves.Power(0.5)


def log() -> MaskedSchedule:
    """m = log2(1 + t). Weight 1/((1 + t) ln(1 + t))."""
    return curves.Log()


def geometric(sigma_min: ArrayLike, sigma_max: ArrayLike) -> MaskedSchedule:
    """m = 1 - exp(-sigma), log sigma linear in t from sigma_min to sigma_max. SEDD, MDLM.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max, both finite.
    """
    low, high = as_parameter(sigma_min, "sigma_min"), as_parameter(sigma_max, "sigma_max")
    check_finite("geometric", sigma_min=low, sigma_max=high)
    if is_concrete(low, high) and not 0 < low < high:
        raise ValueError(f"geometric needs 0 < sigma_min < sigma_max, got {low}, {high}")
    return curves.Geometric(low, high)


def linear_sigma(sigma_min: ArrayLike, sigma_max: ArrayLike) -> MaskedSchedule:
    """m = 1 - exp(-sigma), sigma linear in t from sigma_min to sigma_max. MDLM's "linear".

    Raises:
        ValueError: unless 0 <= sigma_min < sigma_max, both finite.
    """
    low, high = as_parameter(sigma_min, "sigma_min"), as_parameter(sigma_max, "sigma_max")
    check_finite("linear_sigma", sigma_min=low, sigma_max=high)
    if is_concrete(low, high) and not 0 <= low < high:
        raise ValueError(f"linear_sigma needs 0 <= sigma_min < sigma_max, got {low}, {high}")
    return curves.LinearSigma(low, high)


def log_uniform(low: ArrayLike, high: ArrayLike) -> MaskedSchedule:
    """log m uniform between log low and log high. Weight ln(high/low) for every t.

    So an unweighted sum of masked cross-entropies is the bound, up to that constant; MDLM's
    "importance sampling" option.

    Raises:
        ValueError: unless 0 < low < high <= 1.
    """
    low, high = _rates("log_uniform", low, high)
    if is_concrete(low) and not low > 0:
        raise ValueError(f"log_uniform needs low > 0, got {low}")
    return curves.LogUniform(low, high)


def uniform_logsnr(low: ArrayLike, high: ArrayLike) -> MaskedSchedule:
    """logSNR uniform on [low, high]. Weight (high - low) (1 - m).

    Raises:
        ValueError: unless low < high, both finite.
    """
    low, high = as_parameter(low, "low"), as_parameter(high, "high")
    check_finite("uniform_logsnr", low=low, high=high)
    check_interval("uniform_logsnr", low, high)
    return curves.UniformLogsnr(low, high)


MASKED_SCHEDULES: dict[str, Callable[..., MaskedSchedule]] = {
    "linear": linear,
    "loglinear": loglinear,
    "clipped": clipped,
    "cosine_md4": cosine_md4,
    "cosine_mdlm": cosine_mdlm,
    "cosine_squared": cosine_squared,
    "power": power,
    "sqrt": sqrt,
    "log": log,
    "geometric": geometric,
    "linear_sigma": linear_sigma,
    "log_uniform": log_uniform,
    "uniform_logsnr": uniform_logsnr,
}
"""Name -> factory, for configurations."""


def by_name(name: str, **parameters: ArrayLike) -> MaskedSchedule:
    """The schedule of that name; ``parameters`` are those of its factory.

    Raises:
        ValueError: for an unknown name, with the nearest known ones, or the place of the Gaussian
            schedule that has it.
        TypeError: for a parameter the factory does not have.
    """
    if name not in MASKED_SCHEDULES:
        raise unknown_schedule(name, "masked")
    return MASKED_SCHEDULES[name](**parameters)


def _rates(name: str, low: ArrayLike, high: ArrayLike) -> tuple[ArrayLike, ArrayLike]:
    low, high = as_parameter(low, "low"), as_parameter(high, "high")
    if is_concrete(low, high) and not 0 <= low < high <= 1:
        raise ValueError(f"{name} needs masking rates 0 <= low < high <= 1, got {low}, {high}")
    return low, high
