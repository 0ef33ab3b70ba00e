"""Every variance transform in one list; a new one joins all property tests by one line here."""

from mdm_jax import variance

SINGLES = {
    "identity": variance.identity,
    "stratified": variance.stratified,
    "systematic": variance.systematic,
    "mirror": variance.mirror,
}

CHAINS = {
    "empty": variance.chain,
    "stratified_mirror": lambda: variance.chain(variance.stratified(), variance.mirror()),
    "systematic_mirror": lambda: variance.chain(variance.systematic(), variance.mirror()),
    "nested": lambda: variance.chain(variance.chain(variance.stratified()), variance.mirror()),
}

ALL = SINGLES | CHAINS
