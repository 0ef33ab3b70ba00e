"""Published benchmarks: what their configs share, time on a GPU, runs measured on other files."""
