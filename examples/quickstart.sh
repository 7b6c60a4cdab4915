#!/usr/bin/env bash
# Trains a small GPT, its data mixture decided online, on text that this machine already has.
#
# Run it by `make quickstart`. Everything it makes lies in quickstart/; what is there is reused, an
# interrupted training goes on, and deleting the folder starts over.
set -euo pipefail
cd "$(dirname "$0")/.."

bin=.venv/bin
out=quickstart
steps=200
cores=$(nproc)
gpus=$("$bin/python" -c 'import torch; print(torch.cuda.device_count())')
processes=2 # on CPU, or on two GPUs and more
if [ "$gpus" -eq 1 ]; then processes=1; fi
threads=$((cores > processes ? cores / processes : 1))

say() { printf '\n[%s] %s\n' "$(date +%T)" "$*"; }

if [ ! -f $out/corpus/train.jsonl.zst ]; then
  say "corpus: collecting text of different kinds from this machine"
  "$bin/python" tools/build_local_corpus.py --output $out/corpus
fi

if [ ! -f $out/tokenizer.model ]; then
  say "tokenizer: training sentencepiece on it"
  "$bin/python" tools/train_tokenizer.py \
    --input $out/corpus/train.jsonl.zst --output $out/tokenizer.model --vocab-size 4096
fi

for part in train valid; do
  if [ ! -f $out/data/$part/manifest.json ]; then
    say "data: $part text to one Megatron dataset a domain"
    "$bin/python" tools/preprocess_pile.py \
      --input $out/corpus/$part.jsonl.zst --output-dir $out/data/$part --workers "$cores" \
      --tokenizer-type SentencePieceTokenizer --tokenizer-model $out/tokenizer.model
  fi
done

if [ "$(cat $out/checkpoints/latest_checkpointed_iteration.txt 2>/dev/null)" != $steps ]; then
  device="$processes CPU processes"
  if [ "$gpus" -gt 0 ]; then device="$processes GPU"; fi
  say "training: $steps steps on $device, tensor parallel $processes, policy acodm"
  OMP_NUM_THREADS=$threads "$bin/torchrun" --standalone --nproc-per-node $processes \
    -m megatron_acodm.train \
    --num-layers 4 --hidden-size 128 --num-attention-heads 4 \
    --seq-length 256 --max-position-embeddings 256 \
    --micro-batch-size 4 --global-batch-size 48 --train-iters $steps \
    --lr 3e-3 --min-lr 3e-4 --lr-warmup-fraction 0.05 \
    --tensor-model-parallel-size $processes \
    --data-path $out/data/train/manifest.json --valid-data-path $out/data/valid/manifest.json \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model $out/tokenizer.model \
    --eval-interval $steps --eval-iters 8 --log-interval 10 \
    --save $out/checkpoints --save-interval 100 --load $out/checkpoints \
    --acodm-policy acodm --run-dir $out/run
  "$bin/python" -m megatron_acodm.report $out/run | tail -1
else
  say "training: all $steps steps are there (delete $out/ to start over)"
  "$bin/python" -m megatron_acodm.report $out/run
fi
