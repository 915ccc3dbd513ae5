"""Counts of the model: parameters and floating-point operations. Pure arithmetic."""

from megacode.recipe import ModelSection


def block_parameters(model: ModelSection, tensor: int = 1) -> int:
    """Parameters of one transformer block on one of `tensor` ranks.

    They share q, k, v, o, gate, up and down; two norms are whole on each.
    """
    kv_width = model.kv_heads * model.head_dim
    attention = 2 * model.hidden * model.hidden + 2 * model.hidden * kv_width
    return -(-(attention + 3 * model.hidden * model.ffn) // tensor) + 2 * model.hidden


def num_parameters(model: ModelSection) -> int:
    """Parameters of the whole model: blocks, embedding, last norm, untied head."""
    assert model.vocabulary is not None
    return model.layers * block_parameters(model) + 2 * model.vocabulary * model.hidden + model.hidden


def flops_per_token(model: ModelSection, sequence_length: int) -> int:
    """Floating-point operations that training on one token needs, forward and backward: what MFU counts.

    6 (N - V h) + 6 L h s: a multiply-add for each parameter but the embedding's (a look-up), forward once and backward
    twice; attention over the s / 2 positions that a token sees on average (the causal half; PaLM's appendix B counts
    the whole square, 12 L h s). Recomputed activations do not count. Document masks do not shorten s.
    """
    assert model.vocabulary is not None
    matrices = num_parameters(model) - model.vocabulary * model.hidden
    return 6 * matrices + 6 * model.layers * model.hidden * sequence_length
