"""How good is a checkpoint: perplexity by domain, and the tasks of lm-evaluation-harness."""
