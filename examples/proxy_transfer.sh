#!/usr/bin/env bash
# Proxy mode from end to end: a small model's run learns a policy, which then drives a larger model;
# the larger model is also trained with natural weights. Each run has its report; OUTPUT/table.md
# and plots compare the larger model with and without the proxy.
#
#   examples/proxy_transfer.sh TRAIN_MANIFEST VALID_MANIFEST OUTPUT [trainer flags]
#
# The manifests are those of tools/preprocess_pile.py. STEPS, PROXY and TARGET (model flags) may be
# set in the environment, also PROCESSES of each run and PYTHON; further flags go to all three runs.
# A run that is there is not repeated; where it was made with other settings, that is an error.
set -euo pipefail

train=$1 valid=$2 output=$3
shift 3
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$here/.venv/bin/python}
processes=${PROCESSES:-1}
proxy=${PROXY:---num-layers 2 --hidden-size 64 --num-attention-heads 4}
target=${TARGET:---num-layers 6 --hidden-size 128 --num-attention-heads 4}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

run() { # name, flags of the run
  local directory=$output/$1
  shift
  local settings="$train $valid $processes ${STEPS:-300} $* ${policy_sum:-}"
  if [ -f "$directory/report.html" ]; then
    [ "$settings" = "$(cat "$directory/settings" 2>/dev/null)" ] && return
    echo "error: $directory was made with other settings; remove it, or name another OUTPUT" >&2
    exit 1
  fi
  echo "== ${directory##*/} =="
  mkdir -p "$directory"
  echo "$settings" >"$directory/settings"
  "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" \
    -m megatron_acodm.train --data-path "$train" --valid-data-path "$valid" --seq-length 128 \
    --micro-batch-size 2 --global-batch-size 48 --train-iters "${STEPS:-300}" --lr 2e-3 \
    --min-lr 2e-5 --lr-warmup-fraction 0.05 --eval-interval 100 --eval-iters 1000 \
    --log-interval 50 --data-cache-path "$output/cache" --run-dir "$directory" "$@"
  "$python" -m megatron_acodm.report "$directory"
}

# shellcheck disable=SC2086  # the models are several words
{
  run proxy $proxy --acodm-policy acodm --acodm-save-policy "$output/policy" "$@"
  policy_sum=$(cksum <"$output/policy.safetensors")  # no older proxy may have driven the target
  run target_with_proxy $target --acodm-policy frozen --acodm-load-policy "$output/policy" "$@"
  policy_sum=
  run target_natural $target --acodm-policy static "$@"
}

"$python" - "$output" <<'PYTHON'
import sys
from pathlib import Path

from megatron_acodm.reporting.comparison import Comparison, tables
from megatron_acodm.reporting.comparison_plots import write_plots
from megatron_acodm.reporting.run import Run

output = Path(sys.argv[1])
folders = {"natural": "target_natural", "with the proxy": "target_with_proxy"}
runs = {name: {1: Run.load(output / folder)} for name, folder in folders.items()}
comparison = Comparison(runs, ["natural"])
(output / "table.md").write_text(tables(comparison), encoding="utf-8")
print(tables(comparison))
print("plots:", *write_plots(comparison, output))
PYTHON
