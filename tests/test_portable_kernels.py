"""The sketch and the Gram matrix as processors without AVX-512, or without AVX, compute them."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_acodm import ops

CSRC = Path(__file__).resolve().parent.parent / "csrc"
CXX = shutil.which(os.environ.get("CXX", "c++"))
DRIVER = """
#include "alignment_kernels.h"
using namespace megatron_acodm::cpu;
extern "C" {
int64_t num_products(int64_t K) { return num_gram_products(K); }
void gram_f32(const float* G, int64_t K, int64_t P, double* out) {
  gram_products(G, K, P, 0, P, 64, out);
}
void gram_bf16(const void* G, int64_t K, int64_t P, double* out) {
  gram_products(static_cast<const BFloat16Bits*>(G), K, P, 0, P, 64, out);
}
void sketch_f32(float* row, int64_t m, const float* g, int64_t n, uint64_t key) {
  add_sketch(row, m, g, n, key, 0, (n + m - 1) / m);
}
void sketch_bf16(float* row, int64_t m, const void* g, int64_t n, uint64_t key) {
  add_sketch(row, m, static_cast<const BFloat16Bits*>(g), n, key, 0, (n + m - 1) / m);
}
}
"""


@pytest.fixture(params=["AVX2", "baseline"])
def kernels(request: pytest.FixtureRequest, tmp_path: Path) -> ctypes.CDLL:
    """The CPU kernels, compiled as if the processor had no newer instructions than these."""
    if CXX is None:
        pytest.skip("there is no C++ compiler")
    if request.param == "AVX2" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("this processor has no AVX2")
    # avx2 and fma have no longer a name than avx2; avx512f and the like do.
    supports = '(sizeof(feature) <= sizeof("avx2"))' if request.param == "AVX2" else "false"
    (tmp_path / "driver.cpp").write_text(DRIVER)
    command = [CXX, "-O1", "-std=c++17", "-shared", "-fPIC", f"-I{CSRC / 'cpu'}"]
    command += [f"-D__builtin_cpu_supports(feature)={supports}", tmp_path / "driver.cpp"]
    command += [CSRC / "cpu/alignment_kernels.cpp", "-o", tmp_path / "kernels.so"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(tmp_path / "kernels.so"))


def test_older_processors_compute_the_same(kernels: ctypes.CDLL) -> None:
    def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(tensor.data_ptr())

    integer = ctypes.c_int64
    kernels.num_products.restype = integer
    for dtype, suffix in ((torch.float32, "f32"), (torch.bfloat16, "bf16")):
        for m, n in ((64, 1000), (320, 5), (1024, 9001)):
            g, row = torch.randn(n).to(dtype), torch.randn(m)
            expected = row.clone()
            ops.add_sketch_reference_(expected, g, 11)
            sketch = getattr(kernels, f"sketch_{suffix}")
            sketch(pointer(row), integer(m), pointer(g), integer(n), ctypes.c_uint64(11))
            assert torch.equal(row, expected)
        for K, P in ((1, 5), (4, 64), (4, 1037)):  # one group of rows: products in plain order
            G = torch.zeros(4, P).to(dtype)
            G[:K] = torch.randn(K, P)
            out = torch.empty(kernels.num_products(integer(K)), dtype=torch.float64)
            gram = getattr(kernels, f"gram_{suffix}")
            gram(pointer(G), integer(K), integer(P), pointer(out))
            exact = G.double() @ G.double().T
            norms = exact.diagonal().sqrt()
            assert torch.all((out.view(4, 4) - exact).abs() <= 1e-6 * norms[:, None] * norms)
