"""Completion and infilling on an exported model."""

from types import SimpleNamespace

import pytest
import torch
import typer
from support.exports import write_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from megacode.checkpoint.convert.exporting import export
from megacode.data.infill import infilling_prompt
from megacode.data.tokenizer import Tokenizer
from megacode.errors import UserError
from megacode.tools.generate import complete, generate, infill


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(2)
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("run"))
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export(checkpoint, folder, "fp32", check=lambda written: None)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def pieces(folder):
    return Tokenizer(folder / "tokenizer.model")


class Scripted:
    """A model that writes given ids; keeps the prompt that it saw and what stops it."""

    device = torch.device("cpu")
    config = SimpleNamespace(max_position_embeddings=64)

    def __init__(self, writes):
        self.writes = writes

    def generate(self, tokens, *, eos_token_id, **options):
        self.prompt, self.stops = tokens[0].tolist(), eos_token_id
        return torch.cat([tokens, torch.tensor([self.writes])], dim=1)


def greedy(model, ids, count, stop):
    """What transformers' generate writes, without it: the whole sequence again for each token."""
    written = []
    for _ in range(count):
        written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
        if written[-1] == stop:
            break
    return written


def test_completion_is_greedy(folder, tokenizer, pieces):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = "def test_f(x):\n    "
    written = greedy(model, [pieces.bos, *pieces.encode(prompt)], 20, pieces.eos)
    # Decoded by transformers on both sides: random weights write broken UTF-8, which it shows in its own way.
    expected = tokenizer.decode([*pieces.encode("a"), *written], skip_special_tokens=True)
    assert "a" + complete(model, tokenizer, prompt, 20) == expected


@pytest.mark.parametrize("text", [" = 1", "return", "    \u00e9\U0001f600 x", ""])
def test_completion_keeps_the_first_space_and_stops_at_eos(tokenizer, pieces, text):
    model = Scripted([*pieces.encode_continuation(text), pieces.eos])
    assert complete(model, tokenizer, "x </s>", 8) == text
    assert model.prompt == [pieces.bos, *pieces.encode("x </s>")]  # spelled, not the end of a document
    assert model.stops == [pieces.eos]


@pytest.mark.parametrize("middle", [" + 1", "value", "\n    return 1\n", ""])
@pytest.mark.parametrize(("prefix", "suffix"), [("def f(", "): pass"), ("", " x"), ("  x", ""), ("<s>", "</s>")])
def test_infilling(tokenizer, pieces, prefix, suffix, middle):
    model = Scripted([*pieces.encode_continuation(middle), pieces.eot_id])
    assert infill(model, tokenizer, prefix, suffix, 8) == middle
    base = pieces.vocabulary - 16
    expected = [1, base + 7, *pieces.encode(prefix), base + 8, *pieces.encode_continuation(suffix), base + 9]
    assert model.prompt == expected == infilling_prompt(prefix, suffix, pieces)
    assert pieces.eot_id in model.stops


def test_infilling_cut_at_the_limit_keeps_what_is_written(tokenizer, pieces):
    model = Scripted(pieces.encode_continuation(" abc def"))
    assert infill(model, tokenizer, "a", "b", 8) == " abc def"


def test_too_long_a_prompt(tokenizer):
    with pytest.raises(UserError, match="beyond the model's 64"):
        complete(Scripted([]), tokenizer, "x = 1\n", 62)


def test_command(folder, tokenizer):
    app = typer.Typer()
    app.command()(generate)
    result = CliRunner().invoke(app, [str(folder), "--prompt", "def f", "--max-new-tokens", "5"])
    assert result.exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert result.stdout == complete(model, tokenizer, "def f", 5) + "\n"
    for wrong in (
        ["--prompt", "a", "--prefix", "b", "--suffix", "c"],
        [],
        ["--prefix", "a"],
        ["--prompt", "a", "--suffix", "c"],
    ):
        assert isinstance(CliRunner().invoke(app, [str(folder), *wrong]).exception, UserError)
    assert isinstance(CliRunner().invoke(app, [str(folder.parent), "--prompt", "a"]).exception, UserError)
