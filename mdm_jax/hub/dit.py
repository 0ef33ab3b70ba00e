"""Families whose body is the DiT of MDLM, BD3-LM and Duo."""

from mdm_jax.hub.family import Family

FAMILIES: tuple[Family, ...] = ()
