"""transformers' own Llama, layer by layer from an exported folder."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megacode.checkpoint.convert.forward import stream
from megacode.checkpoint.convert.stored import SafetensorsFile


class TransformersForward:
    """See `forward.Forward`. The configuration is what transformers makes of config.json.

    Args:
        folder: a HuggingFace folder of safetensors.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        files = [SafetensorsFile(path) for path in sorted(folder.glob("*.safetensors"))]
        self._files = {name: file for file in files for name in file.shapes}
        self._config = AutoConfig.from_pretrained(folder, attn_implementation="eager")
        self._rotary = LlamaRotaryEmbedding(self._config)

    def differences(self) -> list[str]:
        """What transformers would miss in the folder, find too much or of another shape; empty: nothing."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self._config)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        shapes = {name: file.shapes[name] for name, file in self._files.items()}
        found = [f"transformers misses {name}" for name in expected if name not in shapes]
        found += [f"transformers does not know {name}" for name in shapes if name not in expected]
        found += [
            f"transformers expects {list(shape)} of {name}, not {list(shapes[name])}"
            for name, shape in expected.items()
            if shapes.get(name, shape) != shape
        ]
        return found

    def embed(self, tokens: Tensor) -> Tensor:
        return self._files["model.embed_tokens.weight"].read("model.embed_tokens.weight")[tokens].float()

    def block(self, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        later = torch.full((x.shape[1], x.shape[1]), -math.inf).triu(1)
        output = self._layer(layer)(x, attention_mask=later, position_embeddings=self._rotary(x, positions))
        assert isinstance(output, Tensor)
        return output

    def rotated(self, layer: int, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        attention = self._layer(layer).self_attn
        q, k = (proj(x).unflatten(-1, (-1, attention.head_dim)) for proj in (attention.q_proj, attention.k_proj))
        cos, sin = self._rotary(x, positions)
        q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
        return q, k

    def logits(self, x: Tensor) -> Tensor:
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        norm = LlamaRMSNorm(self._config.hidden_size, self._config.rms_norm_eps)
        with torch.device("meta"):
            head = nn.Linear(self._config.hidden_size, self._config.vocab_size, bias=False)
        stream(norm, lambda name: self._read("model.norm.weight"))
        stream(head, lambda name: self._read("lm_head.weight"))
        logits = head(norm(x))
        assert isinstance(logits, Tensor)
        return logits

    def _layer(self, layer: int) -> Any:
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        with torch.device("meta"):
            module = LlamaDecoderLayer(self._config, layer).eval()
        stream(module, lambda name: self._read(f"model.layers.{layer}.{name}"))
        return module

    def _read(self, name: str) -> Tensor:
        return self._files[name].read(name).float()
