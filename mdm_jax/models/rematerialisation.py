"""What the backward pass computes anew instead of keeping it from the forward pass."""

import flax.linen as nn
import jax

from mdm_jax.models.products import product_p


def _products(primitive, *_, **__) -> bool:
    return primitive in (jax.lax.dot_general_p, product_p)


def _products_without_batch(primitive, *_, **params) -> bool:
    dimensions = params.get("dimension_numbers", params.get("dimensions"))
    return _products(primitive) and dimensions[1] == ((), ())


POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": _products,
    "dots_without_batch": _products_without_batch,
}
"""By name, what is kept of a block. "none": everything that is needed; "full": its input alone, so
the whole block runs again; "dots": the results of all products; "dots_without_batch": of those with
weights, so that attention and all elementwise functions run again.
"""


def rematerialised(module: type[nn.Module], name: str, scanned: bool = False) -> type[nn.Module]:
    """The same module under a policy: equal values and gradients, less memory, more products.

    Args:
        module: class of a module.
        name: of ``POLICIES``.
        scanned: it is the body of a scan, which by itself keeps the two passes apart.
    """
    if name == "none":
        return module
    return nn.remat(module, prevent_cse=not scanned, policy=POLICIES[name])
