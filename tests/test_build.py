from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
NVCC = shutil.which("nvcc")
CXX = shutil.which(os.environ.get("CXX", "c++"))
CUDA_ARCHITECTURES = ("80", "90", "100")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
needs_compiler = pytest.mark.skipif(CXX is None, reason="there is no C++ compiler")


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )


# ---------------------------------------------------------------- installing


@needs_compiler
@pytest.mark.parametrize("module", ["_C", "_ledger"])
def test_where_there_is_a_compiler_the_extensions_are_built(module):
    # The build leaves out what fails; this is where that is noticed.
    importlib.import_module(f"megatron_acodm.{module}")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The sources that a build needs, apart from this checkout."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copytree(CSRC, tmp_path / "csrc")
    (tmp_path / "megatron_acodm").mkdir()
    return tmp_path


def build(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # An empty PATH: no compiler, no ninja, no nvcc.
    (checkout / "bin").mkdir()
    environment = {"PATH": str(checkout / "bin"), "HOME": str(checkout), **environment}
    return run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=checkout, env=environment)


def test_without_a_compiler_the_build_succeeds_and_names_what_it_left_out(checkout):
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    stale = checkout / "megatron_acodm" / f"_C{suffix}"
    stale.write_bytes(b"of an earlier build")
    done = build(checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "leaving out megatron_acodm._ledger: it did not build" in done.stdout
    assert "leaving out megatron_acodm._C: it did not build" in done.stdout
    assert not list((checkout / "megatron_acodm").iterdir())


def test_without_torch_the_build_says_how_to_install(checkout):
    (checkout / "stub").mkdir()
    (checkout / "stub" / "torch.py").write_text("raise ImportError('no torch here')\n")
    done = build(checkout, PYTHONPATH=str(checkout / "stub"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch cannot be imported here (no torch here)" in done.stdout
    assert "--no-build-isolation" in done.stdout


@pytest.fixture(scope="module")
def setup_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("acodm_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cuda_kernels_are_built_only_with_the_nvcc_of_torchs_cuda(setup_module, tmp_path):
    assert "without CUDA" in setup_module.why_no_cuda(None, str(tmp_path))
    assert "nvcc is not found" in setup_module.why_no_cuda("12.8", None)
    assert "nvcc is not found" in setup_module.why_no_cuda("12.8", str(tmp_path))
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    nvcc.chmod(0o755)
    assert setup_module.why_no_cuda("12.8", str(tmp_path)) is None
    assert "nvcc is of CUDA 12.4, torch of CUDA 13.0" in setup_module.why_no_cuda(
        "13.0", str(tmp_path)
    )


def test_the_toolkit_is_found_behind_a_wrapper_of_nvcc(setup_module, tmp_path, monkeypatch):
    toolkit = tmp_path / "cuda-13.0"
    (toolkit / "bin").mkdir(parents=True)
    wrapper = tmp_path / "path" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f"#!/bin/sh\necho '#$ TOP={toolkit}/bin/..' >&2\n")
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", str(wrapper.parent))
    assert setup_module.toolkit_of_nvcc() == str(toolkit.resolve())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup_module.toolkit_of_nvcc() is None


# ---------------------------------------------------------------- the CPU kernels of other machines

DRIVER = """
#include "alignment_kernels.h"
using namespace megatron_acodm::cpu;
extern "C" void sums(const float* G, int64_t K, int64_t P, int64_t tile, double* out) {
  alignment_sums(G, K, P, 0, P, tile, out);
}
extern "C" void sums_bf16(const void* G, int64_t K, int64_t P, int64_t tile, double* out) {
  alignment_sums(static_cast<const BFloat16Bits*>(G), K, P, 0, P, tile, out);
}
extern "C" void growth(float* row, const void* main_grad, void* seen, int64_t n) {
  accumulate_growth(row, static_cast<const BFloat16Bits*>(main_grad),
                    static_cast<BFloat16Bits*>(seen), n);
}
"""


@needs_compiler
@pytest.mark.parametrize(
    ("version", "supports"),
    [
        ("AVX2", '(sizeof(feature) <= sizeof("avx2"))'),  # avx2 and fma, but nothing longer
        ("baseline", "false"),
    ],
)
def test_kernels_for_older_processors_agree(version, supports, tmp_path):
    if version == "AVX2" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("this processor has no AVX2")
    (tmp_path / "driver.cpp").write_text(DRIVER)
    done = run(
        *(CXX, "-O1", "-std=c++17", "-shared", "-fPIC", f"-I{CSRC / 'cpu'}"),
        f"-D__builtin_cpu_supports(feature)={supports}",
        *(tmp_path / "driver.cpp", CSRC / "cpu/alignment_kernels.cpp", "-o", tmp_path / "k.so"),
    )
    assert done.returncode == 0, done.stderr
    kernels = ctypes.CDLL(str(tmp_path / "k.so"))
    for K, P in ((1, 5), (3, 64), (22, 1000), (9, 4099)):
        for dtype, name in ((torch.float32, "sums"), (torch.bfloat16, "sums_bf16")):
            G = torch.randn(K, P).to(dtype)
            out = torch.empty(K, 2, dtype=torch.float64)
            pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (G, out))
            source, target = pointers
            getattr(kernels, name)(
                source, ctypes.c_int64(K), ctypes.c_int64(P), ctypes.c_int64(512), target
            )
            gram = G.double() @ G.double().T
            norms = gram.diagonal().sqrt()
            error = (out[:, 0] - (gram.sum(1) - gram.diagonal())).abs()
            assert torch.all(error <= 1e-6 * norms * norms.sum())
            torch.testing.assert_close(out[:, 1], gram.diagonal(), rtol=1e-6, atol=0)
    row, main_grad, seen = torch.randn(77), torch.randn(77).bfloat16(), torch.randn(77).bfloat16()
    expected = row + (main_grad.float() - seen.float())
    kernels.growth(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (row, main_grad, seen)),
        ctypes.c_int64(77),
    )
    assert torch.equal(row, expected)
    assert torch.equal(seen, main_grad)


# ---------------------------------------------------------------- the CUDA sources, without a GPU


@needs_nvcc
def test_cuda_kernels_compile_for_every_architecture(tmp_path):
    known = run(NVCC, "--list-gpu-code").stdout.split()
    targets = [number for number in CUDA_ARCHITECTURES if f"sm_{number}" in known]
    if not targets:
        pytest.skip(f"this nvcc knows none of sm_{', sm_'.join(CUDA_ARCHITECTURES)}")
    done = run(
        *(NVCC, "-std=c++17", "-O3", "--threads", "0", "-Werror", "all-warnings"),
        *("-Xptxas", "-v", "-c", CSRC / "cuda/alignment_kernels.cu", "-o", tmp_path / "k.o"),
        *(f"-gencode=arch=compute_{number},code=sm_{number}" for number in targets),
    )
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill", done.stdout + done.stderr)
    assert spills
    assert set(spills) == {"0"}


@needs_nvcc
def test_cuda_kernels_move_sixteen_bytes_at_a_time_and_use_no_atomics(tmp_path):
    ptx = tmp_path / "k.ptx"
    done = run(
        *(NVCC, "-std=c++17", "-O3", "-arch=compute_80", "-ptx"),
        *(CSRC / "cuda/alignment_kernels.cu", "-o", ptx),
    )
    assert done.returncode == 0, done.stderr
    code = ptx.read_text()
    assert re.search(r"cp\.async\.cg\.shared\.global \[[^\]]+\], \[[^\]]+\], 16", code)
    assert re.search(r"ld\.global(\.nc)?\.v4", code)
    assert re.search(r"st\.global\.v4", code)
    assert not re.search(r"\b(atom|red)\.", code)


@needs_nvcc
def test_the_binding_of_the_cuda_kernels_compiles_against_this_torch(tmp_path):
    include = Path(torch.__file__).parent / "include"
    if not (include / "c10/cuda/CUDAStream.h").exists():
        pytest.skip("this torch comes without its CUDA headers")
    macros = include / "c10/cuda/impl/cuda_cmake_macros.h"
    if not macros.exists():  # a CPU build of torch leaves out this one generated header
        macros = tmp_path / "c10/cuda/impl/cuda_cmake_macros.h"
        macros.parent.mkdir(parents=True)
        macros.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    done = run(
        *(NVCC, "-std=c++20", "-O0", "-Xcompiler", "-fPIC", f"-I{tmp_path}", f"-I{include}"),
        f"-I{sysconfig.get_path('include')}",
        *("-c", CSRC / "cuda/alignment_ops.cpp", "-o", tmp_path / "ops.o"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
