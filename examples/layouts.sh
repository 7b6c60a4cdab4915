#!/usr/bin/env bash
# Preprocesses a corpus in the Pile's format and trains on it in three layouts: tensor, data and
# pipeline parallel, two processes each.
#
#   examples/layouts.sh CORPUS OUTPUT [trainer flags]
#
# CORPUS holds train/*.jsonl.zst and val.jsonl.zst (or .jsonl, .jsonl.gz); OUTPUT receives the
# tokenizer, the datasets, and a run directory with its report for each layout. What exists is
# reused.
set -euo pipefail

corpus=$1 output=$2
shift 2
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$here/.venv/bin/python}
mkdir -p "$output"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

tokenizer=$output/tokenizer.model
[ -f "$tokenizer" ] ||
  "$python" "$here/tools/train_tokenizer.py" --input "$corpus"/train/*.jsonl* --output "$tokenizer"
for split in train val; do
  [ -f "$output/$split/manifest.json" ] && continue
  inputs=("$corpus/$split".jsonl*)
  [ -d "$corpus/$split" ] && inputs=("$corpus/$split"/*.jsonl*)
  "$python" "$here/tools/preprocess_pile.py" --input "${inputs[@]}" --output-dir "$output/$split" \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$tokenizer"
done

declare -A layouts=(
  [tensor]="--tensor-model-parallel-size 2"
  [data]=""
  [pipeline]="--pipeline-model-parallel-size 2"
)
for layout in tensor data pipeline; do
  run=$output/run_$layout
  [ -f "$run/report.html" ] && continue
  echo "== $layout parallel =="
  # shellcheck disable=SC2086  # a layout is several words
  "$python" -m torch.distributed.run --standalone --nproc-per-node 2 -m megatron_acodm.train \
    --data-path "$output/train/manifest.json" --valid-data-path "$output/val/manifest.json" \
    --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 128 \
    --micro-batch-size 2 --global-batch-size 32 --train-iters 300 --lr 2e-3 --min-lr 2e-4 \
    --lr-warmup-fraction 0.05 --eval-interval 300 --eval-iters 1 --log-interval 50 \
    --data-cache-path "$output/cache" --run-dir "$run" ${layouts[$layout]} "$@"
  "$python" -m megatron_acodm.report "$run"
done
