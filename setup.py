"""Package description; tool settings are in pyproject.toml."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "mdm_jax/__init__.py").read_text(), re.M)[1]
HOME = ""  # public address of the repository, once it has one: fills in the URLs

# Lower bounds are the versions that the tests run with; newer ones are expected to work.
# What a run of the quickstart imports, from the first batch to the report. docs/install.md says why
# TFDS is not among it.
REQUIRED = [
    "absl-py>=2.1",
    "etils>=1.12",
    "flax>=0.12",
    "grain>=0.2.18",
    "jax>=0.10",
    "matplotlib>=3.9",
    "ml-collections>=1.0",
    "numpy>=2.0",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11.30",
    "scipy>=1.11",
    "tensorboardX>=2.6.2",
    "tokenizers>=0.20",
    "tqdm>=4.66",
]
BUCKET = ["gcsfs>=2025.2"]
TRAIN = ["tensorboard>=2.18"]  # the program; event files are written by tensorboardX
DIGITS = ["scikit-learn>=1.5"]
DATA = [
    *DIGITS,
    "array_record>=0.8",
    "importlib_resources>=6.0",  # TFDS 4.9.10 imports it to prepare data sets
    "pyarrow>=17",
    "tensorflow-datasets>=4.9.9",
]
HUB = ["huggingface_hub>=0.26", "jinja2>=3.1"]  # jinja2: chat templates
EVAL = [*HUB, "lm_eval>=0.4.13"]
DOCS = ["mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"]
NOTEBOOKS = [*DIGITS, "ipykernel>=6.29", "nbclient>=0.10"]
DEV = [
    *DATA,
    *EVAL,
    *NOTEBOOKS,
    "chex>=0.1.90",
    "hypothesis>=6.100",
    "pillow>=10",
    "pytest>=8.0",
    "pytest-xdist>=3.6",
    "pyyaml>=6.0",  # reads CITATION.cff
    "ruff>=0.12",
    "safetensors>=0.5",  # reads what mdm_jax.hub wrote
    "setuptools>=77",  # builds wheels by itself, with the licence as an expression
]

setuptools.setup(
    name="mdm_jax",
    version=VERSION,
    description="Masked diffusion in JAX, with the variance of its training measured and removed.",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "mdm_jax/data/embedded/LICENSE.txt"],
    author="The mdm_jax authors",
    keywords="masked diffusion, discrete diffusion, variance reduction, JAX, Flax",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    project_urls={
        "Source": HOME,
        "Documentation": f"{HOME}/tree/main/docs",
        "Changelog": f"{HOME}/blob/main/CHANGELOG.md",
        "Issues": f"{HOME}/issues",
    }
    if HOME
    else {},
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["mdm_jax", "mdm_jax.*"]),
    package_data={"mdm_jax.data": ["embedded/*"]},
    entry_points={"console_scripts": ["mdm = mdm_jax.launch.__main__:run"]},
    install_requires=REQUIRED,
    extras_require={
        "cuda12": ["jax[cuda12]>=0.10"],
        "cuda13": ["jax[cuda13]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        # The compilers of `mdm compile` for GPUs, without the libraries of programs that run.
        "gpu-compile": ["jax-cuda12-plugin>=0.10", "nvidia-cuda-nvcc-cu12>=12.6"],
        "train": TRAIN,
        "data": DATA,
        "digits": DIGITS,
        "hub": HUB,
        "eval": EVAL,
        "bucket": BUCKET,
        "notebooks": NOTEBOOKS,
        "docs": DOCS,
        "dev": DEV,
    },
)
