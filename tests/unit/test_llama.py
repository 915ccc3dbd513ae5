"""The one-process model: equal to transformers' LlamaForCausalLM, and of Code Llama's exact size."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megacode.kernels.attention import Segments
from megacode.model.layers import IGNORE, Slice, initial_values
from megacode.model.llama import Llama, initialise, num_parameters
from megacode.recipe import ModelSection

VOCABULARY = 97


def model_section(kv_heads: int, theta: float) -> ModelSection:
    return ModelSection(
        layers=3, hidden=64, heads=4, kv_heads=kv_heads, ffn=112, vocabulary=VOCABULARY, rope_theta=theta, init_std=0.1
    )


def transformers_model(config: ModelSection, weights: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    hf = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocabulary, hidden_size=config.hidden, intermediate_size=config.ffn,
            num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
            rms_norm_eps=config.norm_epsilon, rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            max_position_embeddings=config.max_positions, tie_word_embeddings=False, attn_implementation="eager",
        )
    )  # fmt: skip
    hf.load_state_dict(weights)
    return hf


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("masks", [False, True], ids=["plain", "document masks"])
def test_logits_and_gradients_equal_transformers(kv_heads, theta, masks):
    config = model_section(kv_heads, theta)
    model = initialise(Llama(config), seed=3)
    hf = transformers_model(config, model.state_dict())
    batch, sequence = 2, 24
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (batch, sequence), generator=generator)
    labels = tokens.roll(-1, 1)
    labels[:, -1] = IGNORE
    labels[0, :5] = IGNORE

    cuts = [0, 7, 8, 24, 33, 48] if masks else [0, 24, 48]
    flat = torch.arange(batch * sequence)
    segments = torch.bucketize(flat, torch.tensor(cuts), right=True).view(batch, sequence)
    positions = (flat - torch.tensor(cuts)[segments.flatten() - 1]).view(batch, sequence)
    documents = Segments.between(cuts) if masks else None
    allowed = (segments.unsqueeze(2) == segments.unsqueeze(1)) & torch.ones(sequence, sequence).tril().bool()
    bias = torch.zeros(batch, 1, sequence, sequence).masked_fill(~allowed.unsqueeze(1), torch.finfo(torch.float32).min)

    logits = model(tokens, positions, documents)
    expected = hf(input_ids=tokens, position_ids=positions, attention_mask=bias).logits
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()

    loss = model(tokens, positions, documents, labels).sum()
    loss.backward()
    expected_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum")
    expected_loss.backward()
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    theirs = dict(hf.named_parameters())
    ours = dict(model.named_parameters())
    assert set(ours) == set(theirs)
    for name, parameter in ours.items():
        want = theirs[name].grad
        assert (parameter.grad - want).norm() <= 1e-5 * want.norm(), name


@pytest.mark.parametrize(
    ("preset", "vocabulary", "count"),
    [
        ("code-llama-7b", 32000, 6_738_415_616),
        ("code-llama-7b", 32016, 6_738_546_688),
        ("code-llama-13b", 32000, 13_015_864_320),
        ("code-llama-13b", 32016, 13_016_028_160),
        ("code-llama-34b", 32000, 33_743_970_304),
        ("code-llama-70b", 32000, 68_976_648_192),
        ("code-llama-70b", 32016, 68_976_910_336),
    ],
)
def test_presets_have_code_llamas_size(preset, vocabulary, count):
    config = ModelSection.model_validate({"preset": preset, "vocabulary": vocabulary})
    assert num_parameters(config) == count
    assert config.head_dim == 128


def test_initial_values_depend_on_seed_and_name_alone():
    part = Slice((40, 30), 0.02)
    value = initial_values("a.weight", part, 1)
    assert torch.equal(value, initial_values("a.weight", part, 1))
    assert not torch.equal(value, initial_values("b.weight", part, 1))
    assert not torch.equal(value, initial_values("a.weight", part, 2))
    assert value.std() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(initial_values("n.weight", Slice((5,), 0.0), 1), torch.ones(5))
