"""Shape and arithmetic of a transformer."""

import dataclasses

import jax.numpy as jnp

from mdm_jax.models import attention, rematerialisation

_CHOICES = {
    "norm": ("rms", "layer"),
    "mlp": ("gelu", "swiglu"),
    "attention": attention.CHOICES,
    "remat": tuple(rematerialisation.POLICIES),
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and arithmetic of a :class:`Transformer`.

    Attributes:
        vocab_size: K, including the mask token.
        width: residual width, divisible by ``num_heads`` into an even head size.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the feed-forward layer over ``width`` (for "swiglu" the hidden
            width is taken times 2/3, so that the parameter counts agree).
        norm: "rms" or "layer".
        mlp: "gelu" or "swiglu".
        condition_on_logsnr: adaptive norms and gates driven by the noise level (adaLN-zero, Peebles
            & Xie 2022). Off by default: the masked bound's optimum does not need the level.
        tie_embeddings: use the embedding matrix as the output projection.
        scan_layers: one compiled block scanned over depth; compiles faster, runs slower on CPUs.
        qk_norm: RMS norms on queries and keys (Henry et al. 2020), which keep attention from
            saturating at high learning rates.
        rope_base: wavelength base of the rotary positions.
        learned_positions: longest row for which every position has a learned vector, added to its
            token's; 0 for none. Rotary positions tell how far apart two tokens are and nothing
            else; grids and other fixed layouts are learnt sooner with both.
        self_conditioning: takes an earlier estimate of the clean tokens as a second input (Chen et
            al. 2022, Analog Bits), through the embedding table and a projection that starts at
            zero, so that a new network ignores it.
        attention: name of an implementation (:mod:`mdm_jax.models.attention`); "auto" for the best
            on the backend of the process.
        remat: what the backward pass computes anew, block by block: "none", "full", "dots" or
            "dots_without_batch" (:mod:`mdm_jax.models.rematerialisation`). On CPUs it needs
            ``scan_layers``: their compiler merges the two passes of an unrolled block again.
        dtype: of the operands of matrix products, in both passes; accumulation, softmax and norms
            are float32.
        param_dtype: of the parameters.

    Raises:
        ValueError: for sizes below 1, widths that do not divide, or unknown names.
    """

    vocab_size: int
    width: int = 128
    depth: int = 4
    num_heads: int = 4
    mlp_ratio: float = 4.0
    norm: str = "rms"
    mlp: str = "gelu"
    condition_on_logsnr: bool = False
    tie_embeddings: bool = False
    scan_layers: bool = False
    qk_norm: bool = False
    rope_base: float = 10_000.0
    learned_positions: int = 0
    self_conditioning: bool = False
    attention: str = "auto"
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        for name in ("vocab_size", "width", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.learned_positions < 0:
            raise ValueError(
                f"learned_positions must not be negative, got {self.learned_positions}"
            )
        if self.width % (2 * self.num_heads):
            raise ValueError(
                f"width {self.width} must be a multiple of 2 * num_heads = {2 * self.num_heads} "
                "(rotary positions need an even head size)"
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")

    @property
    def hidden(self) -> int:
        """Hidden width of the feed-forward layer."""
        share = 2 / 3 if self.mlp == "swiglu" else 1.0
        return max(8, round(self.width * self.mlp_ratio * share / 8) * 8)
