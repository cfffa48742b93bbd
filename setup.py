"""Packaging of neuron_lightning; tested versions are pinned in tools/constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

LLAMA = ["transformers>=5.0", "tokenizers>=0.22", "matplotlib>=3.8", "jsonargparse[signatures]>=4.39"]
TEST = ["pytest>=8.3", "pytest-timeout>=2.3", "hypothesis>=6.100"]

setup(
    name="neuron-lightning",
    version="0.1.0",
    description="PyTorch Lightning for AWS Trainium: tensor parallel, ZeRO-1, the same script on CPU and CUDA",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["neuron_lightning", "neuron_lightning.*"]),
    package_data={"neuron_lightning": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.9,<2.14",
        "lightning>=2.6.6,<2.7",
        "numpy>=1.26",
        "safetensors>=0.4.5",
        "tensorboard>=2.16",
        "tqdm>=4.66",
    ],
    extras_require={
        "llama": LLAMA,
        # trn1 and inf2; torch_neuronx and neuronx-distributed come from the vendor's own package index.
        "xla": ["torch>=2.9,<2.10", "torch_xla>=2.9,<2.10"],
        "test": TEST,
        "dev": [
            *LLAMA,
            *TEST,
            "ninja>=1.11",
            "ruff>=0.12",
            "mypy>=1.15",
        ],
    },
    entry_points={"console_scripts": ["neuron-lightning = neuron_lightning.cli.main:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
