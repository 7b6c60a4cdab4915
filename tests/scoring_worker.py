"""Scores and continues the questions of ``test_evaluate.py`` on several ranks; prints the answers.

Arguments: checkpoint, tensor-parallel size.
"""

from __future__ import annotations

import json
import sys

import torch.distributed as dist
from evaluation import open_scorer
from questions import CONTINUATIONS, PROMPTS

from megatron_acodm.megatron.groups import initialize_distributed
from megatron_acodm.megatron.tokenizer import build_tokenizer

root, size = sys.argv[1], int(sys.argv[2])
initialize_distributed(size, 1, seed=1, timeout_minutes=2)
scorer = open_scorer(root, build_tokenizer("NullTokenizer", None, 63), processes=size)
if dist.get_rank() == 0:
    answers = [scorer.loglikelihoods(CONTINUATIONS), scorer.generate(PROMPTS)]
    scorer.dismiss()
    print("answers", json.dumps(answers), flush=True)
else:
    scorer.follow()
dist.barrier()
dist.destroy_process_group()
