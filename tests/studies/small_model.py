"""A user's own small model, as `py:tests.studies.small_model:build`."""

from transformers import LlamaConfig, LlamaForCausalLM


def build() -> LlamaForCausalLM:
    """Return a Llama of two narrow layers."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config)
