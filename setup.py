"""Package description; tool settings are in pyproject.toml."""

import pathlib

import setuptools

ROOT = pathlib.Path(__file__).parent

# Lower bounds are the versions that the tests run with; newer ones are expected to work.
REQUIRED = [
    "absl-py>=2.1",
    "etils>=1.12",
    "flax>=0.12",
    "grain>=0.2.18",
    "jax>=0.10",
    "jinja2>=3.1",  # chat templates
    "matplotlib>=3.9",
    "ml-collections>=1.0",
    "numpy>=2.0",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11.30",
    "scipy>=1.11",
    "tensorboardX>=2.6.2",
    "tensorflow-datasets>=4.9.9",
    "array_record>=0.8",
    "tokenizers>=0.20",
    "tqdm>=4.66",
]
DIGITS = ["scikit-learn>=1.5"]
EVAL = ["lm_eval>=0.4.13"]
DEV = [
    *DIGITS,
    *EVAL,
    "chex>=0.1.90",
    "hypothesis>=6.100",
    "pillow>=10",
    "pytest>=8.0",
    "pytest-xdist>=3.6",
    "ruff>=0.12",
    "safetensors>=0.5",  # reads what mdm_jax.hub wrote
    "setuptools>=70.1",  # builds wheels by itself
]
DOCS = ["mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"]
NOTEBOOKS = [*DIGITS, "ipykernel>=6.29", "nbclient>=0.10"]

setuptools.setup(
    name="mdm_jax",
    version="0.1.0",
    description="Masked diffusion in JAX, with the variance of its training measured and removed.",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["mdm_jax", "mdm_jax.*"]),
    package_data={"mdm_jax.data": ["embedded/*"]},
    entry_points={"console_scripts": ["mdm = mdm_jax.launch.__main__:run"]},
    install_requires=REQUIRED,
    extras_require={
        "bucket": ["gcsfs>=2025.2"],
        "digits": DIGITS,
        "eval": EVAL,
        "dev": DEV,
        "docs": DOCS,
        "notebooks": NOTEBOOKS,
    },
)
