"""Mistral: Llama whose queries see a sliding window, which is the configuration's. https://arxiv.org/abs/2310.06825"""

from __future__ import annotations

from pagoda.models.llama import LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    """`config.layer_windows` makes the difference."""
