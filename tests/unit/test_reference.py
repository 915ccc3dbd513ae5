"""The plain forward of a source's files is Llama: transformers computes the same, for both kinds of files."""

import pytest
import torch
from support.conversions import shape, weights, write_hf, write_meta
from support.exports import train_tokenizer
from transformers import AutoModelForCausalLM

from megacode.checkpoint.convert.reference import Reference


@pytest.mark.parametrize("kind", ["hf", "meta"])
@torch.inference_mode()
def test_logits(tmp_path, kind):
    torch.set_num_threads(2)
    tokenizer = train_tokenizer(tmp_path / "tokenizer.model")
    model = shape(tokenizer)
    tensors = weights(model, torch.float32)
    hf = write_hf(tmp_path / "hf", model, tensors, tokenizer)
    if kind == "hf":
        reference = Reference.of_hf(hf)
    else:
        meta = write_meta(tmp_path / "meta", model, tensors, tokenizer, 4)
        reference = Reference.of_meta(meta)
    tokens = torch.randint(model.vocabulary, (2, 50), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(50).expand(2, 50)
    x = reference.embed(tokens)
    for layer in range(model.layers):
        x = reference.block(layer, x, positions)
    expected = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(reference.logits(x), expected, atol=2e-5, rtol=1e-5)
