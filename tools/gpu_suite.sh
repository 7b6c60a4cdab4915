#!/usr/bin/env bash
# Builds, checks and times on one GPU what a machine without one cannot: one command, no network.
#
#   tools/gpu_suite.sh [--device cpu] OUT_DIR [WHEEL_DIR]
#
# It takes under nine minutes and leaves OUT_DIR/gpu_suite.json and OUT_DIR/gpu_suite.log; the kernels
# are built into megatron_acodm/. Python (PYTHON, else python3) must have torch and numpy; every other
# package that it lacks is taken from the wheels in WHEEL_DIR, into a folder that is removed again.
# --device cpu is a dry run at small shapes. Exit code 0: every step held; 1: a step failed or ran out
# of time; 2: there is no CUDA device, or the command line is wrong.
set -uo pipefail

python=${PYTHON:-python3}
device=cuda
if [ "${1:-}" = --device ]; then
  device=${2:-}
  shift $(($# < 2 ? $# : 2))
fi
if [ $# -lt 1 ] || [ $# -gt 2 ] || { [ "$device" != cuda ] && [ "$device" != cpu ]; }; then
  echo "usage: $0 [--device cpu] OUT_DIR [WHEEL_DIR]" >&2
  exit 2
fi
if [ -n "${2:-}" ] && [ ! -d "$2" ]; then
  echo "error: WHEEL_DIR $2 is not a folder" >&2
  exit 2
fi
if [ "$device" = cuda ] && ! "$python" -c '
import torch
raise SystemExit(not torch.cuda.is_available())'; then
  echo "error: $python finds no CUDA device (no torch, a torch without CUDA, no driver or no GPU);" \
    "run it on a machine with one, or try the steps with --device cpu" >&2
  exit 2
fi

mkdir -p "$1" || exit 1
out=$(cd "$1" && pwd)
wheels=$(cd "${2:-/nonexistent}" 2>/dev/null && pwd)
repo=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
cd "$repo" || exit 1
: >"$out/gpu_suite.log"
: >"$work/steps.tsv"
deadline=$((SECONDS + 525))
failed=0

export PYTHONPATH="$work/packages:$repo" PATH="$work/packages/bin:$PATH" PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR="$work/inductor" TRITON_CACHE_DIR="$work/triton"
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} # a machine apart may not resolve its own name
unset WORLD_SIZE RANK LOCAL_RANK MASTER_ADDR MASTER_PORT
if [ "$device" = cpu ]; then export CUDA_VISIBLE_DEVICES=""; fi

# --- How a step runs -----------------------------------------------------------------------------

# step NAME LIMIT COMMAND...: runs it for at most LIMIT seconds, or what is left of the suite's time.
# Its exit code never ends the suite. What the command writes to $work/NAME.json are its figures.
step() {
  local name=$1 limit=$2 left=$((deadline - SECONDS)) start code result
  shift 2
  if [ "$left" -lt 10 ]; then
    note "$name" "not run: the time is up" 0 0 0
    return
  fi
  if [ "$limit" -gt "$left" ]; then limit=$left; fi
  printf '[%s] %s (at most %d s)\n' "$(date +%T)" "$name" "$limit"
  start=$(date +%s%N)
  timeout --kill-after=10 "$limit" "$@" >"$work/$name.log" 2>&1
  code=$?
  case $code in
    0) result=ok ;;
    124 | 137) result="FAILED: out of time" ;;
    *) result="FAILED" ;;
  esac
  { echo "===== $name: $result ($code)" && cat "$work/$name.log"; } >>"$out/gpu_suite.log"
  if [ "$code" -ne 0 ]; then tail -n 15 "$work/$name.log" | sed 's/^/    /'; fi
  note "$name" "$result" "$code" "$((($(date +%s%N) - start) / 1000000))" "$limit"
}

# note NAME RESULT CODE MILLISECONDS LIMIT: adds a line to the record, and writes it out at once.
note() {
  if [ "$2" != ok ]; then failed=1; fi
  printf '%s\t%s\t%s\t%s\t%s\n' "$@" >>"$work/steps.tsv"
  "$python" - "$work" "$out" "$device" <<'EOF'
import json
import sys
from pathlib import Path

work, out, device = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]


def read(path):
    return json.loads(path.read_text()) if path.exists() else None


steps = []
for line in (work / "steps.tsv").read_text().splitlines():
    name, result, code, milliseconds, limit = line.split("\t")
    step = {"step": name, "result": result, "exit_code": int(code), "limit_s": int(limit)}
    step |= {"seconds": int(milliseconds) / 1000, "figures": read(work / f"{name}.json")}
    if result != "ok" and (work / f"{name}.log").exists():
        log = (work / f"{name}.log").read_text(errors="replace")
        step["log_tail"] = log.splitlines()[-40:]
    steps.append(step)
suite = {"device": device} | (read(work / "environment.json") or {}) | {"steps": steps}
(out / "gpu_suite.json").write_text(json.dumps(suite, indent=1) + "\n")
EOF
}

# --- The steps -----------------------------------------------------------------------------------

# What this Python lacks comes from the wheels, package by package; what is missing then is named.
step packages 90 "$python" - "$work" "$wheels" "$device" <<'EOF'
import importlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path

work, wheels, device = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
NEEDED = {  # module: package
    **{"numpy": "numpy", "setuptools": "setuptools", "pybind11": "pybind11"},
    **{"megatron.core": "megatron-core", "google.protobuf": "protobuf", "psutil": "psutil"},
    **{"yaml": "pyyaml", "safetensors": "safetensors", "sentencepiece": "sentencepiece"},
    **{"tqdm": "tqdm", "zstandard": "zstandard", "matplotlib": "matplotlib"},
}


def said(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return (done.stdout + done.stderr).strip()


def name_of(package):
    return package.lower().replace("_", "-").replace(".", "-")


installed = {name_of(d.metadata["Name"] or "") for d in importlib.metadata.distributions()}
offered = {name_of(f.name.partition("-")[0]) for f in Path(wheels).glob("*.whl")} if wheels else ()
pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
pip += ["--no-index", "--no-deps", "--find-links", wheels, "--target", str(work / "packages")]
for package in sorted(offered):
    if package not in installed and not package.startswith(("torch", "triton", "nvidia-")):
        print(f"from {wheels}: {package} {said(*pip, package)}")
importlib.invalidate_caches()

import torch  # only now, as it takes seconds

hardware = {"machine": platform.platform(), "name": platform.machine()}
versions = {"python": platform.python_version(), "torch": torch.__version__}
versions |= {"cuda of torch": torch.version.cuda}
versions["nvcc"] = said("nvcc", "--version").rpartition("\n")[2]
if device == "cuda":
    properties = torch.cuda.get_device_properties(0)
    hardware |= {"name": properties.name, "memory_bytes": properties.total_memory}
    hardware["compute_capability"] = f"{properties.major}.{properties.minor}"
    versions["driver"] = said(
        "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
    )
    versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
missing = []
for module, package in NEEDED.items():
    try:
        importlib.import_module(module)
        versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        versions[package] = "unknown"
    except Exception as error:  # an import may fail in any way
        print(f"{module}: {type(error).__name__}: {error}")
        missing.append(package)
(work / "environment.json").write_text(json.dumps({"hardware": hardware, "versions": versions}))
if missing:
    sys.exit(f"needed but missing: {', '.join(missing)}; put their wheels into WHEEL_DIR")
EOF

if [ "$device" = cuda ]; then
  # For this GPU alone. setup.py leaves out what does not build: the next step notices.
  TORCH_CUDA_ARCH_LIST=$("$python" -c '
import torch
print("{}.{}".format(*torch.cuda.get_device_capability()))')
  export TORCH_CUDA_ARCH_LIST
  step build 200 "$python" setup.py build_ext --inplace --build-temp "$work/build" \
    --build-lib "$work/lib"
else
  echo "build: left out on the CPU; what is built already is used"
fi
step built 60 "$python" - "$device" <<'EOF'
import importlib
import sys

from megatron_acodm import ops

for name in ("_ledger", "_C", "_C_cuda")[: 3 if sys.argv[1] == "cuda" else 2]:
    print(importlib.import_module(f"megatron_acodm.{name}").__file__)
sys.exit(not ops.has_fused_kernels(sys.argv[1]))
EOF

step operators 90 "$python" tools/check_operators.py --device "$device" \
  --json "$work/operators.json"

# Pythia-1B as the budgets have it. Six rounds come after two of warm-up, whatever the time.
if [ "$device" = cuda ]; then
  step step_time 320 "$python" tools/benchmark_step_time.py --device cuda --shape pythia-1b \
    --rounds 30 --time-limit 150 --json "$work/step_time.json"
else
  step step_time 270 "$python" tools/benchmark_step_time.py --device cpu --shape pythia-14m \
    --num-layers 4 --seq-length 32 --micro-batch-size 2 --micro-batches 4 --vocab-size 512 \
    --domains 3 --rounds 6 --json "$work/step_time.json"
fi

if [ "$device" = cuda ]; then
  shapes=(--numbers 1e7 5e7 --domains 7 22 --rounds 6)
else
  shapes=(--numbers 1e5 --domains 3 --rounds 2 --micro-batches 4)
fi
step alignment 110 "$python" tools/benchmark_alignment.py --device "$device" "${shapes[@]}" \
  --json "$work/alignment.json"

step corpus 60 "$python" tools/build_local_corpus.py --output "$work/text" \
  --max-bytes-per-domain 400000
step preprocess 60 "$python" tools/preprocess_pile.py --input "$work/text/train.jsonl.zst" \
  --output-dir "$work/data" --workers 2 --tokenizer-type ByteLevelTokenizer
steps=40
step train 120 "$python" -m megatron_acodm.train --data-path "$work/data/manifest.json" \
  --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 \
  --micro-batch-size 2 --global-batch-size 48 --train-iters $steps --lr 3e-3 --min-lr 3e-4 \
  --eval-interval $steps --eval-iters 1 --save "$work/checkpoint" --run-dir "$work/run" \
  --acodm-policy acodm
step trained 30 "$python" - "$work/run/metrics.jsonl" $steps "$work/trained.json" <<'EOF'
import json
import math
import sys
from pathlib import Path

lines = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
steps = [line for line in lines if "lm_loss" in line]
assert len(steps) == int(sys.argv[2]), f"{len(steps)} steps were recorded"
first, last = steps[0], steps[-1]
figures = {"first_loss": first["lm_loss"], "last_loss": last["lm_loss"]}
figures |= {"mixing_s": last["mixing_time_s"]} | last["diagnostics"]
Path(sys.argv[3]).write_text(json.dumps(figures))
weights = [[domain["weight"] for domain in step["domains"].values()] for step in (first, last)]
assert all(math.isfinite(step["lm_loss"]) for step in steps), figures
assert last["lm_loss"] < first["lm_loss"], figures
assert weights[0] != weights[1], f"the mixture never moved from {weights[0]}"
assert figures["dropped_steps"] == figures["policy_failures"] == 0, figures
assert "critic_loss" in figures, f"the agent learnt nothing: {figures}"
EOF

# --- What came of it -----------------------------------------------------------------------------

"$python" - "$out/gpu_suite.json" <<'EOF'
import json
import sys
from pathlib import Path

suite = json.loads(Path(sys.argv[1]).read_text())
print()
for key in ("hardware", "versions"):
    print(f"{key}: " + ", ".join(f"{name} {value}" for name, value in suite.get(key, {}).items()))
print(f"\n{'step':12} {'seconds':>8}  result")
for step in suite["steps"]:
    print(f"{step['step']:12} {step['seconds']:8.1f}  {step['result']}")
figures = {step["step"]: step["figures"] or {} for step in suite["steps"]}
for row in figures.get("step_time", {}).get("candidates", ()):
    over = f", {row['over_static']:+.3%} over it" if "over_static" in row else ""
    verdict = f" (budget {row['budget']:.1%}: {row['verdict']})" if "budget" in row else ""
    print(f"a step of {row['candidate']}: {row['median_step_s']:.4f} s{over}{verdict}")
for shape in figures.get("alignment", {}).get("shapes", ()):
    for row in shape["operators"]:
        rate = f"{row['what']}: {row['ratio']:.2f} of the first's time"
        share = f", {row['copy_share']:.0%} of copy bandwidth" if "copy_share" in row else ""
        print(f"K={shape['domains']}, P={shape['numbers']:,}, {rate}{share}")
EOF
echo "figures: $out/gpu_suite.json, output of all steps: $out/gpu_suite.log"
exit "$failed"
