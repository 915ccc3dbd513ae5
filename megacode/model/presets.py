"""Shapes of the Code Llama models and of small ones for the CPU. Pure data: no torch, read by the recipe.

Sources: params.json of the released checkpoints and their HF config.json. The feed-forward width follows Meta's rule
`round_up(int(multiplier * int(2 * 4 * hidden / 3)), multiple_of)`.
"""

from typing import Any

CODE_LLAMA = {"norm_epsilon": 1e-5, "rope_theta": 1e6, "max_positions": 16384}

PRESETS: dict[str, dict[str, Any]] = {
    "code-llama-7b": {
        "layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 32, "ffn": 11008, "vocabulary": 32016, **CODE_LLAMA,
    },
    "code-llama-13b": {
        "layers": 40, "hidden": 5120, "heads": 40, "kv_heads": 40, "ffn": 13824, "vocabulary": 32016, **CODE_LLAMA,
    },
    "code-llama-34b": {
        "layers": 48, "hidden": 8192, "heads": 64, "kv_heads": 8, "ffn": 22016, "vocabulary": 32000, **CODE_LLAMA,
    },
    "code-llama-70b": {
        "layers": 80, "hidden": 8192, "heads": 64, "kv_heads": 8, "ffn": 28672, "vocabulary": 32016, **CODE_LLAMA,
    },
    # A few hundred thousand parameters: unit tests.
    "nano": {
        "layers": 4, "hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 176,
        "norm_epsilon": 1e-5, "rope_theta": 1e4, "max_positions": 2048,
    },
    # 3.4 million parameters with a 4k vocabulary: minutes on a laptop.
    "micro": {
        "layers": 4, "hidden": 192, "heads": 6, "kv_heads": 6, "ffn": 512,
        "norm_epsilon": 1e-5, "rope_theta": 1e4, "max_positions": 4096,
    },
}  # fmt: skip
