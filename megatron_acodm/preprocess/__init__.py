"""Turns Pile-format text into one Megatron indexed dataset a domain, and says so in a manifest."""
