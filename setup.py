"""Packaging of k2jax. The wheel holds the library; configs, experiments, benchmarks and tests need a clone."""

from pathlib import Path

from setuptools import find_packages, setup

version = next(
    line.split('"')[1] for line in Path("k2jax/__init__.py").read_text().splitlines() if line.startswith("__version__")
)

setup(
    name="k2jax",
    version=version,
    description="Kimi K2, MuonClip and Mixture of Block Attention in JAX",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["k2jax", "k2jax.*"]),
    python_requires=">=3.12",
    install_requires=[
        "jax>=0.11.2",
        "flax>=0.12.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "grain>=0.2.18",
        "tensorstore>=0.1.86",
        "ml-collections>=1.1.0",
        "chex>=0.1.92",
        "array-record>=0.8.3",
        "etils[epath]>=1.12",
        "numpy>=2.0",
        "matplotlib>=3.9",
        "tensorboardX>=2.6",
    ],
    extras_require={
        "cuda12": ["jax[cuda12]>=0.11.2"],
        "cuda13": ["jax[cuda13]>=0.11.2"],
        "tpu": ["jax[tpu]>=0.11.2"],
        "data": ["pyarrow>=18"],
        "hf": ["datasets>=3.2", "tokenizers>=0.21"],
        "k2": ["splintr-rs>=0.22", "tiktoken>=0.9"],
        "wandb": ["wandb>=0.31"],
        "trackio": ["trackio>=0.43"],
        "notebooks": ["ipykernel>=6", "nbclient>=0.10", "nbformat>=5"],
        "dev": [
            "ipykernel>=6",
            "nbclient>=0.10",
            "nbformat>=5",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.17,<0.18",
            "datasets>=3.2",
            "libtpu>=0.0.50; sys_platform == 'linux' and platform_machine == 'x86_64'",  # compiles for TPUs, needs none
            "pyarrow>=18",
            "splintr-rs>=0.22",
            "tiktoken>=0.9",
            "tokenizers>=0.21",
        ],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
