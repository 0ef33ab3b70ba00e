"""DPM-Solver++, second order, multistep."""

import jax.numpy as jnp

from mdm_jax.samplers.denoiser import Denoise
from mdm_jax.samplers.gaussian import GaussianContext, GaussianSampler, GaussianState
from mdm_jax.samplers.gaussian_ddim import transition_mean


def dpm_solver_pp_2m(lower_order_final: bool = True) -> GaussianSampler:
    """DPM-Solver++(2M): DDIM with the estimate of the data extrapolated to the middle of the step.

    One call of the denoiser per step, order 2. With h the step in logSNR and r = h_previous / h the
    estimate used is ``(1 + 1 / 2r) x0 - x0_previous / 2r``; the first step is DDIM's.
    Lu et al. 2022 (arXiv 2211.01095), algorithm 2.

    Args:
        lower_order_final: make the last step DDIM's too, which is safer with few steps. A step to
            +inf is one in any case.
    """

    def step(context: GaussianContext, denoise: Denoise, state: GaussianState) -> GaussianState:
        x0 = denoise(state.x, context.logsnr)
        size = context.next_logsnr - context.logsnr
        previous_size = context.logsnr - context.previous_logsnr
        first_order = (context.index == 0) | jnp.isposinf(context.next_logsnr)
        if lower_order_final:
            first_order |= context.index == context.num_steps - 1
        reach = jnp.where(first_order, 1.0, size) / jnp.where(first_order, 1.0, 2 * previous_size)
        reach = jnp.where(first_order, 0.0, reach)
        middle = x0 + reach * (x0 - state.x0)
        x = transition_mean(context.path, context.logsnr, context.next_logsnr, state.x, middle)
        return GaussianState(x, x0, state.memory)

    return GaussianSampler("dpm_solver_pp_2m", step)
