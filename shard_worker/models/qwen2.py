"""Qwen2 and Qwen2.5 (Qwen Team, 2024): Llama with biases on q, k and v.

A linear layer has the bias that the plan has for it, so nothing is left to say here. The sliding
window of its config.json applies only where `use_sliding_window` is set, which the plan refuses.
"""

from shard_worker.models.llama import Llama


class Qwen2(Llama):
    """`Qwen2ForCausalLM`."""
