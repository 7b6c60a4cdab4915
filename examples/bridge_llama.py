"""Pretrains a Llama with Megatron-Bridge, its data mixture decided by a policy.

    torchrun --nproc-per-node 8 examples/bridge_llama.py MANIFEST [MIX.yaml]

The manifest is that of tools/preprocess_pile.py, with a tokenizer of the size set below; the recipe
is Megatron-Bridge's own. Two lines of it are ours, and one setting that a policy needs.
"""

from __future__ import annotations

import sys

from megatron.bridge.recipes.llama import llama32_1b_pretrain_config
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain

from megatron_acodm import bridge
from megatron_acodm.preprocess.manifest import Manifest

if __name__ == "__main__":
    manifest, *mix = sys.argv[1:]
    config = llama32_1b_pretrain_config()
    config.dataset.blend = (
        [str(domain.prefix) for domain in Manifest.load(manifest).domains],
        None,
    )
    config.dataset.split = "99,1,0"
    config.tokenizer.vocab_size = 50257  # of the tokenizer that the data was made with
    config.train.train_iters = 20_000
    config.dataset.dataloader_type = "single"  # samples are decided as training goes

    bridge.prepare(mix[0] if mix else "examples/configs/paper.yaml")
    pretrain(config, forward_step)
