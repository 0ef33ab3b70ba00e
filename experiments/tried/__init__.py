"""Methods that were tried and left out: prototypes, and the commands that measure them."""
