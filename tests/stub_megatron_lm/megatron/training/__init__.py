"""Stands in for Megatron-LM's training package: the names and the order of calls, nothing else."""
