"""The mode ``tune-levels``: settings of noise levels and the sampling grid, searched together."""
