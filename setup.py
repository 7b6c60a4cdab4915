"""Builds the compiled parts; what cannot be built is named on stdout and left out.

Three extensions, each of which may fail alone: ``_ledger`` (numpy), ``_C`` (torch operators, CPU)
and ``_C_cuda`` (their CUDA kernels). Without one, the package runs on its Python twin. The
metadata is in pyproject.toml.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PACKAGE = "megatron_acodm"
CPP_FLAGS = ["-O3", "-g0", "-fvisibility=hidden"]
OPENMP_FLAGS = [] if sys.platform == "darwin" else ["-fopenmp"]
# Compute capabilities of A100, H100 and B200, each with the first CUDA release that knows it.
CUDA_ARCHITECTURES = {"8.0": (11, 0), "9.0": (11, 8), "10.0": (12, 8)}


def say(message: str) -> None:
    """Tell whoever installs what is built and what is left out (``pip install -v`` shows it)."""
    print(f"megatron-acodm: {message}", flush=True)


def ledger_extension() -> list[Extension]:
    """The ledger's arithmetic over numpy arrays."""
    try:
        import pybind11
    except ImportError:
        say("leaving out _ledger: pybind11 is missing; pip install pybind11, then install again")
        return []
    return [
        Extension(
            f"{PACKAGE}._ledger",
            ["csrc/ledger.cpp"],
            include_dirs=[pybind11.get_include()],
            extra_compile_args=[*CPP_FLAGS, "-std=c++17"],
            language="c++",
            optional=True,
        )
    ]


def toolkit_of_nvcc() -> str | None:
    """Where the toolkit of the nvcc on the path lies, in nvcc's own words.

    torch takes the folder above nvcc's, which holds no headers where nvcc is a wrapper script.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    top = output.partition("TOP=")[2].partition("\n")[0].strip()
    return os.path.realpath(top) if top else None


def operator_extensions() -> list[Extension]:
    """The torch operators: CPU kernels, and CUDA kernels where torch is a CUDA build."""
    toolkit = toolkit_of_nvcc()
    if toolkit and "CUDA_HOME" not in os.environ:
        os.environ["CUDA_HOME"] = toolkit
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        say(
            f"leaving out _C and _C_cuda: torch cannot be imported here ({error}); install torch "
            "first, then this package with pip install --no-build-isolation"
        )
        return []
    extensions = [
        cpp_extension.CppExtension(
            f"{PACKAGE}._C",
            ["csrc/library.cpp", "csrc/cpu/alignment_ops.cpp", "csrc/cpu/alignment_kernels.cpp"],
            extra_compile_args=[*CPP_FLAGS, *OPENMP_FLAGS],
            extra_link_args=OPENMP_FLAGS,
            optional=True,
        )
    ]
    reason = why_no_cuda(torch.version.cuda, cpp_extension.CUDA_HOME)
    if reason:
        say(f"leaving out _C_cuda: {reason}")
        return extensions
    known = [
        name for name, since in CUDA_ARCHITECTURES.items() if since <= release(torch.version.cuda)
    ]
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(known) + "+PTX")
    extensions.append(
        cpp_extension.CUDAExtension(
            f"{PACKAGE}._C_cuda",
            ["csrc/cuda/alignment_ops.cpp", "csrc/cuda/alignment_kernels.cu"],
            extra_compile_args={"cxx": CPP_FLAGS, "nvcc": ["-O3"]},
            optional=True,
        )
    )
    return extensions


def release(version: str) -> tuple[int, ...]:
    """``"12.8"`` as ``(12, 8)``."""
    return tuple(int(part) for part in version.split("."))


def why_no_cuda(torch_cuda: str | None, cuda_home: str | None) -> str | None:
    """Why CUDA kernels cannot be built, or None if they can; a GPU is not needed for that."""
    if torch_cuda is None:
        return "this torch is built without CUDA"
    nvcc = shutil.which("nvcc", path=os.path.join(cuda_home, "bin")) if cuda_home else None
    if nvcc is None:
        return f"nvcc is not found; install the toolkit of CUDA {torch_cuda} or set CUDA_HOME"
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    nvcc_cuda = output.partition("release ")[2].partition(",")[0]
    if nvcc_cuda.partition(".")[0] != torch_cuda.partition(".")[0]:
        return f"nvcc is of CUDA {nvcc_cuda or '(unknown)'}, torch of CUDA {torch_cuda}"
    return None


def tolerant_build() -> type[build_ext]:
    """A build_ext that goes on when an extension does not build."""
    try:
        from torch.utils.cpp_extension import BuildExtension as base
    except ImportError:
        base = build_ext

    class TolerantBuild(base):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                # torch checks the compiler against CUDA's limits before it builds anything.
                rest = [e for e in self.extensions if e.name != f"{PACKAGE}._C_cuda"]
                if len(rest) == len(self.extensions):
                    say(f"leaving out whatever is not built yet: {error}")
                    return
                say(f"leaving out {PACKAGE}._C_cuda: it did not build ({error})")
                self.extensions = rest
                self.build_extensions()

        def build_extension(self, extension: Extension) -> None:
            try:
                super().build_extension(extension)
            except Exception as error:
                say(f"leaving out {extension.name}: it did not build ({error})")
                # Nor may what an earlier build left pass for this one's.
                built = Path(self.get_ext_fullpath(extension.name))
                built.unlink(missing_ok=True)
                Path(PACKAGE, built.name).unlink(missing_ok=True)
            else:
                say(f"built {extension.name}")

    return TolerantBuild


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parent)
    setup(
        ext_modules=ledger_extension() + operator_extensions(),
        cmdclass={"build_ext": tolerant_build()},
    )
