"""Pretrains a Llama with Megatron-Bridge, its data mixture decided by a policy.

    torchrun --nproc-per-node 8 examples/bridge_llama.py MANIFEST MIX.yaml

The manifest is that of tools/preprocess_pile.py. The recipe is Megatron-Bridge's own: it reads the
model's configuration from the Hugging Face hub (gated) and names the folder for checkpoints. Two
lines of it are ours, and one setting that a policy needs.
"""

from __future__ import annotations

import sys

from megatron.bridge.recipes.llama import llama32_1b_pretrain_config
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain

from megatron_acodm import bridge
from megatron_acodm.preprocess.manifest import Manifest

if __name__ == "__main__":
    manifest, mix = sys.argv[1:]
    corpus = Manifest.load(manifest)
    config = llama32_1b_pretrain_config()
    config.dataset.blend = (
        [str(domain.prefix) for domain in corpus.domains],
        None,
    )
    config.dataset.split = "99,1,0"
    config.tokenizer.vocab_size = corpus.tokenizer.vocab_size
    config.train.train_iters = 20_000
    config.dataset.dataloader_type = "single"  # samples are decided as training goes

    bridge.prepare(mix)
    pretrain(config, forward_step)
