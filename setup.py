"""Packaging. Versions tested together are in constraints.txt: `pip install -c constraints.txt -e .`."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megacode",
    version="0.1.0",
    description="Trainer for code language models of the Code Llama family",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    # kernels/ and tools/ are reached through symlinks inside megacode/: nothing is installed at top level but megacode.
    packages=find_packages(include=["megacode", "megacode.*"]),
    install_requires=[
        "torch>=2.11",
        "deepspeed==0.19.8",
        "transformers>=5.23,<6",
        "tokenizers",
        "safetensors",
        "sentencepiece>=0.2.3",
        "fastokens>=0.3.5; platform_system == 'Linux' and platform_machine in 'x86_64 aarch64'",
        "protobuf",
        "numpy",
        "orjson",
        "zstandard>=0.22",
        "packaging",
        "pydantic>=2.10",
        "pyyaml",
        "typer",
        "rich",
    ],
    extras_require={
        "gpu": ["triton>=3.6"],
        "flash": ["flash-attn>=2.1"],
        "logging": ["wandb", "tensorboard"],
        "data": [
            "pyarrow>=15",
            # De-duplication and decontamination. datatrove's extras bring far more; regex and xxhash it needs unsaid.
            *("datatrove==0.10.1", "regex", "xxhash"),
        ],
        "bench": ["matplotlib", "liger-kernel"],
        "dev": [
            *("pytest", "hypothesis", "ruff", "mypy", "types-PyYAML", "triton>=3.6", "wandb", "tensorboard"),
            *("matplotlib", "liger-kernel", "pyarrow>=15", "datatrove==0.10.1", "regex", "xxhash"),
        ],
    },
    entry_points={"console_scripts": ["megacode=megacode.cli:main"]},
)
