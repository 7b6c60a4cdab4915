#!/usr/bin/env bash
# Trains a job on NODES nodes: run this on each of them (examples/train.sbatch does under Slurm).
#
#   [NODES=2 NODE0=host:29500] examples/train.sh JOB.yaml DATA OUTPUT [further arguments]
#
# JOB.yaml has the mixture's settings and the training arguments (examples/configs/pythia_1b.yaml);
# further arguments come after its own, and win. DATA is a folder of tools/preprocess_pile.py. OUTPUT
# receives checkpoints and metrics; the same command goes on from the last checkpoint in it. Job, data
# and output must be on every node under the same paths.
#
# Environment, besides NODES (a range such as 2:4 is elastic) and NODE0 (host and port of the first):
#   MEGATRON_LM_PATH  a checkout whose pretrain_gpt.py trains; without it, our compact trainer
#   PROCESSES         on each node; default: its GPUs, 1 without
#   RESTARTS          how often all begin again from the last checkpoint when a process or a node is
#                     lost (default 0); a lost node must be started again, unless NODES is a range
#   JOB_ID            must be the same on all nodes, and another one for each run on a NODE0
#   PYTHON            interpreter; default: the one of `make venv`
set -euo pipefail

if [ $# -lt 3 ]; then
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
job=$1 data=$2 output=$3
shift 3
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$here/.venv/bin/python}
nodes=${NODES:-1}
if [ "$nodes" != 1 ] && [ -z "${NODE0:-}" ]; then
  echo "error: NODES is $nodes, but NODE0 is not set; give it the first node's host:port" >&2
  exit 2
fi
processes=${PROCESSES:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Else the store that trainers meet in outlives a restart, and they find addresses of the start before.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# What torchrun gives the trainers after SIGTERM, to save and exit; its own default is 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}

torchrun=("$python" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$processes"
  --max-restarts "${RESTARTS:-0}" --rdzv-backend c10d --rdzv-id "${JOB_ID:-acodm}"
  --rdzv-endpoint "${NODE0:-localhost:0}")
common=(--data-path "$data/manifest.json" --data-cache-path "$output/cache"
  --save "$output/checkpoints" --load "$output/checkpoints" "$@")
if [ -n "${MEGATRON_LM_PATH:-}" ]; then
  export PYTHONPATH=$MEGATRON_LM_PATH${PYTHONPATH:+:$PYTHONPATH}
  exec "${torchrun[@]}" -m megatron_acodm.launch --acodm-config "$job" \
    --acodm-run-dir "$output/run" "$MEGATRON_LM_PATH/pretrain_gpt.py" "${common[@]}"
fi
exec "${torchrun[@]}" -m megatron_acodm.train --acodm-config "$job" \
  --run-dir "$output/run" "${common[@]}"
