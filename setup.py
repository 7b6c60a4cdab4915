"""Builds the compiled parts; what cannot be built is named on stdout and left out.

Three extensions, each of which may fail alone: `_ledger` (numpy), `_C` (torch operators for the
CPU) and `_C_cuda` (their CUDA kernels). Without one, the package runs on its Python twin. The
metadata is in pyproject.toml.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

os.chdir(Path(__file__).parent)

CPP_FLAGS = ["-O3", "-g0", "-fvisibility=hidden"]
# Compute capabilities of A100, H100 and B200, and the first CUDA that knows each.
CUDA_ARCHITECTURES = {"8.0": 11.0, "9.0": 11.8, "10.0": 12.8}


def say(message: str) -> None:
    """Tell whoever installs, also through pip, what is built and what is left out."""
    print(f"megatron-acodm: {message}", file=sys.stdout, flush=True)


def ledger_extension() -> list[Extension]:
    """The ledger's arithmetic over numpy arrays."""
    try:
        import pybind11
    except ImportError:
        say("leaving out _ledger: pybind11 is missing; pip install pybind11, then install again")
        return []
    return [
        Extension(
            "megatron_acodm._ledger",
            ["csrc/ledger.cpp"],
            include_dirs=[pybind11.get_include()],
            extra_compile_args=[*CPP_FLAGS, "-std=c++17"],
            language="c++",
            optional=True,
        )
    ]


def operator_extensions() -> list[Extension]:
    """The torch operators: CPU kernels, and CUDA kernels where nvcc and a CUDA torch are there."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        say(
            f"leaving out _C: torch cannot be imported ({error}); install torch, then "
            "pip install --no-build-isolation megatron-acodm"
        )
        return []
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    extensions = [
        cpp_extension.CppExtension(
            "megatron_acodm._C",
            ["csrc/library.cpp", "csrc/cpu/alignment_ops.cpp", "csrc/cpu/alignment_kernels.cpp"],
            extra_compile_args=[*CPP_FLAGS, *openmp],
            extra_link_args=openmp,
            optional=True,
        )
    ]
    reason = why_no_cuda(torch.version.cuda, cpp_extension.CUDA_HOME)
    if reason:
        say(f"leaving out the CUDA kernels: {reason}")
        return extensions
    architectures = [
        name for name, since in CUDA_ARCHITECTURES.items() if float(torch.version.cuda) >= since
    ]
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(architectures) + "+PTX")
    extensions.append(
        cpp_extension.CUDAExtension(
            "megatron_acodm._C_cuda",
            ["csrc/cuda/alignment_ops.cpp", "csrc/cuda/alignment_kernels.cu"],
            extra_compile_args={"cxx": CPP_FLAGS, "nvcc": ["-O3"]},
            optional=True,
        )
    )
    return extensions


def why_no_cuda(torch_cuda: str | None, cuda_home: str | None) -> str | None:
    """Why the CUDA kernels cannot be built, or None if they can. A GPU is not needed."""
    if torch_cuda is None:
        return "this torch is built without CUDA"
    nvcc = shutil.which("nvcc", path=os.path.join(cuda_home, "bin")) if cuda_home else None
    if nvcc is None:
        return f"nvcc is not found; install CUDA {torch_cuda}'s toolkit or set CUDA_HOME"
    release = os.popen(f"'{nvcc}' --version").read().partition("release ")[2].partition(",")[0]
    if release.partition(".")[0] != torch_cuda.partition(".")[0]:
        return f"nvcc is of CUDA {release or '(unknown)'}, torch of CUDA {torch_cuda}"
    return None


def tolerant_build() -> type[build_ext]:
    """A build_ext that goes on when an extension does not build."""
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ImportError:
        BuildExtension = build_ext

    class TolerantBuild(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                say(f"leaving out every compiled part: {error}")

        def build_extension(self, extension: Extension) -> None:
            try:
                super().build_extension(extension)
            except Exception as error:
                say(f"leaving out {extension.name}: it did not build ({error})")
            else:
                say(f"built {extension.name}")

    return TolerantBuild


setup(
    ext_modules=ledger_extension() + operator_extensions(),
    cmdclass={"build_ext": tolerant_build()},
)
