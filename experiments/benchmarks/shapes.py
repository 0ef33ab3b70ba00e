"""The shapes of the benchmarks, and what a training step of one must compute at least."""

from typing import NamedTuple

from mdm_jax.models.transformer import TransformerConfig


class Shape(NamedTuple):
    """Size of a model and of its batch.

    Attributes:
        name: S, M or L.
        length: tokens of a training row.
        vocab_size: K, mask token included.
        width: residual width; the feed-forward layer is four times as wide.
        depth: number of blocks.
        num_heads: attention heads.
        batch_size: training rows.
        sample_length: tokens of a generated row.
        needs_accelerator: too large for a CPU.
    """

    name: str
    length: int
    vocab_size: int
    width: int
    depth: int
    num_heads: int
    batch_size: int
    sample_length: int
    needs_accelerator: bool

    @property
    def mask_id(self) -> int:
        """The mask token, the last of the vocabulary."""
        return self.vocab_size - 1

    def config(self, **settings) -> TransformerConfig:
        """Model of this shape; ``settings`` are further fields of TransformerConfig."""
        sizes = (self.vocab_size, self.width, self.depth, self.num_heads)
        return TransformerConfig(*sizes, **settings)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("S", 256, 28, 128, 4, 4, 32, 256, False),
        Shape("M", 128, 32_000, 256, 6, 8, 16, 256, False),
        Shape("L", 1024, 50_257, 768, 12, 12, 32, 1024, True),
    )
}
SAMPLE_ROWS = 8
"""Rows that are generated at a time."""


def matmul_params(shape: Shape) -> int:
    """Parameters that every token is multiplied with: blocks and head, not the embedding table."""
    block = 4 * shape.width**2 + 2 * shape.width * (4 * shape.width)
    return shape.depth * block + shape.width * shape.vocab_size


def forward_flops(shape: Shape, num_rows: int, length: int) -> float:
    """Floating-point operations of the matrix products of one dense forward pass.

    Two per parameter and token, and ``4 L width`` per token and block for the two products of
    attention over L keys. Norms, activations and the softmaxes are not counted.
    """
    attention = 4 * length * shape.width * shape.depth
    return float(num_rows * length * (2 * matmul_params(shape) + attention))


def train_flops(shape: Shape) -> float:
    """Model FLOP of one training step by the dense definition: three forward passes.

    That is 6 per parameter and token plus attention. All variants are charged this, whether they
    compute less (logits of masked places only) or more (rematerialisation), so model FLOP/s compare
    like tokens/s; a variant that skips half of the head can exceed what it multiplies.
    """
    return 3 * forward_flops(shape, shape.batch_size, shape.length)
