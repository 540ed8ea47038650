"""Mistral 7B (Jiang et al., 2023): Llama with attention that slides over the last tokens."""

from collections.abc import Mapping
from typing import Any

from shard_worker.models.llama import Llama


class Mistral(Llama):
    """`MistralForCausalLM`."""

    @staticmethod
    def sliding_window(config: Mapping[str, Any]) -> int | None:
        return config.get("sliding_window")
