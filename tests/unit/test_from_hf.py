"""`megacode convert from-hf`: what a HuggingFace folder becomes, and back again; what is refused."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.conversions import base_tokenizer, shape, weights, write_hf
from support.exports import train_tokenizer
from support.training import recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from megacode.checkpoint.convert import compare, exporting_receipt, folder, importing_receipt
from megacode.checkpoint.convert.folder import RECEIPT, temporary_folder
from megacode.checkpoint.convert.grown import ROW_TENSORS
from megacode.checkpoint.origin import open_weights
from megacode.checkpoint.reader import DTYPES, CheckpointReader
from megacode.checkpoint.tensorfile import sha256
from megacode.data.tokenizer import Tokenizer
from megacode.errors import UserError
from megacode.model.llama import Llama
from megacode.recipe import load
from megacode.tools.convert import app

REST = """
run: unused
precision: bf16
data: {train: unused}
batch: {global_samples: 1, micro_samples: 1, sequence_length: 16}
optimizer: {learning_rate: 1e-4}
schedule: {steps: 1, warmup_steps: 0}
"""
"""What a recipe has besides what a conversion prints."""
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    torch.set_num_threads(2)
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(autouse=True)
def few_fuzzed_texts(monkeypatch):
    """The tokenizer has its own tests."""
    monkeypatch.setattr(exporting_receipt, "NUM_FUZZED", 50)
    monkeypatch.setattr(importing_receipt, "NUM_FUZZED", 50)


@pytest.fixture(scope="module")
def model(tokenizer):
    return shape(tokenizer)


@pytest.fixture(scope="module")
def tensors(model):
    return weights(model, torch.bfloat16)


@pytest.fixture
def source(tmp_path, model, tensors, tokenizer):
    return write_hf(tmp_path / "source", model, tensors, tokenizer)


def convert(*words):
    result = CliRunner().invoke(app, list(map(str, words)))
    if isinstance(result.exception, UserError):
        assert "\n" not in str(result.exception)
    return result


def refusal(*words):
    """The one line that refuses, before anything is written."""
    result = convert(*words)
    assert isinstance(result.exception, UserError), result.output
    target = Path(words[2])
    assert not target.exists()
    assert not temporary_folder(target).exists()
    return str(result.exception)


@pytest.mark.parametrize(
    ("dtype", "suffix", "num_files"),
    [("bf16", "safetensors", 1), ("fp16", "safetensors", 3), ("fp32", "bin", 2), ("bf16", "bin", 1)],
)
def test_there_and_back_byte_for_byte(tmp_path, model, tokenizer, dtype, suffix, num_files):
    tensors = weights(model, DTYPES[dtype])
    source = write_hf(tmp_path / "source", model, tensors, tokenizer, num_files=num_files, suffix=suffix)
    there = convert("from-hf", source, tmp_path / "own")
    assert there.exit_code == 0, there.output
    checkpoint = CheckpointReader(tmp_path / "own")
    checkpoint.verify()
    assert checkpoint.model == model.model_copy(update={"init_std": 0.02})
    assert (checkpoint.dtype, checkpoint.optimizer, checkpoint.step) == (DTYPES[dtype], None, 0)
    receipt = json.loads((tmp_path / "own" / RECEIPT).read_text())
    assert (receipt["direction"], receipt["agrees"], receipt["dtype"]) == ("from-hf", True, dtype)
    assert [check["name"] for check in receipt["checks"]] == [
        "layout", "config", "tokenizer", "values", "logits", "rotary",
    ]  # fmt: skip
    hashes = {name: {"source": [sha256(tensor)], "written": sha256(tensor)} for name, tensor in tensors.items()}
    assert receipt["tensors"] == hashes
    back = convert("to-hf", tmp_path / "own", tmp_path / "back")
    assert back.exit_code == 0, back.output
    written = load_file(tmp_path / "back" / "model.safetensors")
    assert {name: sha256(tensor) for name, tensor in written.items()} == {n: sha256(t) for n, t in tensors.items()}
    assert json.loads((tmp_path / "back" / RECEIPT).read_text())["tensors"] == hashes
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == tokenizer.read_bytes()


@torch.inference_mode()
def test_transformers_computes_the_same_of_source_and_result(tmp_path, source, model):
    """Not only what the receipt says: both folders as users load them, and megacode's whole model."""
    convert("from-hf", source, tmp_path / "own")
    convert("to-hf", tmp_path / "own", tmp_path / "back")
    tokens = torch.randint(model.vocabulary, (2, 40), generator=torch.Generator().manual_seed(1))
    logits = [
        AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32)(tokens).logits
        for each in (source, tmp_path / "back")
    ]
    assert torch.equal(*logits)
    own, checkpoint = Llama(model), CheckpointReader(tmp_path / "own")
    for name, parameter in own.named_parameters():
        parameter.copy_(checkpoint.read(name))
    torch.testing.assert_close(own(tokens, torch.arange(40).expand(2, 40)), logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_what_an_export_needs_of_the_source_is_carried(tmp_path, source, place):
    template = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    text = template if place.endswith("jinja") else json.dumps({"chat_template": template})
    (source / place).write_text(text)
    generation = {"bos_token_id": 1, "eos_token_id": [2, 615], "temperature": 0.6, "top_p": 0.9, "do_sample": True}
    (source / "generation_config.json").write_text(json.dumps(generation))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "pad_token_id": 0}))
    assert convert("from-hf", source, tmp_path / "own").exit_code == 0
    assert convert("to-hf", tmp_path / "own", tmp_path / "back").exit_code == 0
    back = tmp_path / "back"
    assert (back / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    assert GenerationConfig.from_pretrained(back).eos_token_id == [2, 615]
    assert json.loads((back / "config.json").read_text())["pad_token_id"] == 0
    loaded = AutoTokenizer.from_pretrained(back)
    assert loaded.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello|"


def test_another_type_on_the_way_out(tmp_path, source, tensors):
    convert("from-hf", source, tmp_path / "own")
    result = convert("to-hf", tmp_path / "own", tmp_path / "back", "--dtype", "fp32")
    assert result.exit_code == 0, result.output
    for name, tensor in load_file(tmp_path / "back" / "model.safetensors").items():
        assert torch.equal(tensor, tensors[name].float())


def test_a_run_starts_from_it(tmp_path, source, model):
    convert("from-hf", source, tmp_path / "own")
    config = recipe(model=model.model_dump(), tokenizer={"path": str(tmp_path / "own" / "tokenizer.model")})
    assert open_weights(config, tmp_path / "own").names
    other = recipe(
        model={**model.model_dump(), "ffn": 176}, tokenizer={"path": str(tmp_path / "own" / "tokenizer.model")}
    )
    with pytest.raises(UserError, match=r"model\.ffn is 176"):
        open_weights(other, tmp_path / "own")


@pytest.mark.parametrize("fields", [{}, {"rope_theta": 10000.0, "max_positions": 4096, "norm_epsilon": 1e-6}])
def test_the_printed_lines_of_a_recipe_are_the_whole_of_the_shape(tmp_path, tensors, tokenizer, fields):
    model = shape(tokenizer, **fields)
    own = tmp_path / "own: weights"
    source = write_hf(tmp_path / "source", model, tensors, tokenizer, config={"initializer_range": model.init_std})
    said = convert("from-hf", source, own).stdout
    lines = "model: {" + said.partition("\nmodel: {")[2]
    assert len(lines.splitlines()) == 3
    sections = yaml.safe_load(lines)
    assert sections["tokenizer"] == {"path": str(own / "tokenizer.model")}
    assert sections["checkpoint"] == {"start_from": str(own)}
    given = {"layers", "hidden", "heads", "kv_heads", "ffn", "vocabulary", "rope_theta", "max_positions", "init_std"}
    assert set(sections["model"]) == given | ({"norm_epsilon"} if fields else set())
    (tmp_path / "recipe.yaml").write_text(lines + REST)
    config = load(tmp_path / "recipe.yaml")
    assert config.model == CheckpointReader(own).model == model
    assert open_weights(config, own).names


@pytest.mark.parametrize("new_rows", ["mean", "normal"])
def test_rows_for_infilling(tmp_path, tokenizer, new_rows):
    base = base_tokenizer(tokenizer, tmp_path / "base.model")
    model = shape(base)
    tensors = weights(model, torch.bfloat16)
    source = write_hf(tmp_path / "source", model, tensors, base)
    result = convert("from-hf", source, tmp_path / "own", "--add-infilling", "--new-rows", new_rows)
    assert result.exit_code == 0, result.output
    checkpoint = CheckpointReader(tmp_path / "own")
    old, pieces = model.vocabulary, Tokenizer(checkpoint.tokenizer_path)
    assert checkpoint.model.vocabulary == pieces.vocabulary == old + 16
    assert (pieces.prefix_id, pieces.suffix_id, pieces.middle_id, pieces.eot_id) == tuple(old + i for i in range(7, 11))
    assert checkpoint.tokenizer_path.read_bytes() == tokenizer.read_bytes()
    for name in checkpoint.names:
        whole = checkpoint.read_stored(name)
        if name not in ROW_TENSORS:
            assert torch.equal(whole, tensors[name])
            continue
        assert torch.equal(whole[:old], tensors[name])
        mean, deviation = tensors[name].double().mean(0), tensors[name].double().std(0, correction=0)
        if new_rows == "mean":
            assert torch.equal(whole[old:], mean.bfloat16().expand(16, -1))
        else:
            assert len(whole[old:].unique(dim=0)) == 16
            assert ((whole[old:].double() - mean).abs() < 5 * deviation + 1e-3).all()
    assert convert("to-hf", tmp_path / "own", tmp_path / "back").exit_code == 0
    assert refusal("from-hf", tmp_path / "back", tmp_path / "again", "--add-infilling").endswith(
        "has infilling pieces already; leave --add-infilling out"
    )


def change(key, value):
    def spoil(source):
        config = json.loads((source / "config.json").read_text())
        config[key] = value
        (source / "config.json").write_text(json.dumps(config))

    return spoil


def scale_an_export(source):
    """Megacode's exports name the rotary base under the newer key and the older one."""
    change("rope_parameters", {"rope_type": "default", "rope_theta": 1e6})(source)
    change("rope_scaling", {"type": "linear", "factor": 4.0})(source)


def write(name, text):
    return lambda source: (source / name).write_text(text)


def respell(edit):
    def spoil(source):
        tensors = load_file(source / "model.safetensors")
        edit(tensors)
        save_file(tensors, source / "model.safetensors")

    return spoil


def padded(tensors):
    for name in ROW_TENSORS:
        tensors[name] = torch.nn.functional.pad(tensors[name], (0, 0, 0, 8))


def pad_the_rows(source):
    respell(padded)(source)
    change("vocab_size", 624)(source)


def truncate(source):
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


REFUSED = [
    (change("model_type", "mistral"), "model_type is 'mistral'"),
    (change("architectures", ["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
    (change("rope_scaling", {"type": "linear", "factor": 4.0}), "rope_scaling is"),
    (change("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}), "rope_parameters is"),
    (change("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}), "leave the right one"),
    (change("rope_scaling", {"rope_type": "default", "rope_theta": 5000.0}), "and 5000.0 (rope_scaling); leave"),
    (scale_an_export, "rope_scaling is {'type': 'linear', 'factor': 4.0}"),
    (change("rope_scaling", ["linear"]), "rope_scaling is ['linear']"),
    (change("rope_theta", "big"), "rope_theta = 'big'"),
    (change("eos_token_id", 99999), "eos_token_id is 99999 and the vocabulary has the rows 0 to 615"),
    (change("eos_token_id", [2, 616]), "eos_token_id is [2, 616]"),
    (change("pad_token_id", -1), "pad_token_id is -1"),
    (write("generation_config.json", '{"bos_token_id": 616}'), "generation_config.json: bos_token_id is 616"),
    (write("generation_config.json", "{"), "generation_config.json is damaged"),
    (write("tokenizer_config.json", "{"), "tokenizer_config.json is damaged"),
    (write("tokenizer.json", "{"), "tokenizer.json is damaged"),
    (write("tokenizer.json", '{"model": {"vocab": [["a", 0]]}}'), "tokenizer.json is damaged"),
    (change("tie_word_embeddings", True), "tie_word_embeddings is True"),
    (change("attention_bias", True), "attention_bias is True"),
    (change("mlp_bias", True), "mlp_bias is True"),
    (change("hidden_act", "gelu"), "hidden_act is 'gelu'"),
    (change("head_dim", 8), "head_dim is 8"),
    (change("quantization_config", {"bits": 4}), "quantization_config"),
    (change("num_attention_heads", 7), "must be a multiple of heads"),
    (change("num_hidden_layers", 3), "model.layers.2.input_layernorm.weight is missing"),
    (change("intermediate_size", 208), "has the shape [192, 64] instead of [208, 64]"),
    (respell(lambda tensors: tensors.pop(Q)), f"{Q} is missing"),
    (respell(lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})), "q_proj.bias"),
    (
        respell(lambda tensors: tensors.update({Q: tensors[Q].float()})),
        f"{Q} in model.safetensors is fp32 instead of bf16",
    ),
    (respell(lambda tensors: tensors.update({Q: tensors[Q].to(torch.int8)})), "is int8 instead of bf16"),
    (respell(lambda tensors: tensors.update({Q: tensors[Q][:-1].clone()})), "has the shape [63, 64] instead of"),
    (pad_the_rows, "has 624 rows of the vocabulary and"),
    (truncate, "cannot be read as safetensors"),
    (lambda source: (source / "tokenizer.model").unlink(), "--tokenizer"),
    (lambda source: (source / "model.safetensors").unlink(), "holds no weights"),
    (lambda source: (source / "config.json").unlink(), "cannot read"),
]


@pytest.mark.parametrize(("spoil", "named"), REFUSED, ids=[named for _, named in REFUSED])
def test_wrong_sources_are_refused(tmp_path, source, spoil, named):
    spoil(source)
    assert named in refusal("from-hf", source, tmp_path / "own")


def test_rotary_frequencies_are_no_weights(tmp_path, source):
    respell(lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))(source)
    assert convert("from-hf", source, tmp_path / "own").exit_code == 0


def test_a_missing_shard_is_named(tmp_path, model, tensors, tokenizer):
    source = write_hf(tmp_path / "source", model, tensors, tokenizer, num_files=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    assert "lacks model-00002-of-00003.safetensors, one of the 3" in refusal("from-hf", source, tmp_path / "own")


def test_a_tensor_in_two_files_is_named(tmp_path, model, tensors, tokenizer):
    source = write_hf(tmp_path / "source", model, tensors, tokenizer, num_files=2)
    path = source / "model-00002-of-00002.safetensors"
    first = load_file(source / "model-00001-of-00002.safetensors")
    name = next(iter(first))
    save_file({**load_file(path), name: first[name]}, path)
    assert f"{name} is in" in refusal("from-hf", source, tmp_path / "own")


class _Code:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_no_pickle_is_executed(tmp_path, monkeypatch, model, tensors, tokenizer):
    monkeypatch.chdir(tmp_path)
    source = write_hf(tmp_path / "source", model, tensors, tokenizer, suffix="bin")
    for write in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))):
        write({**tensors, "more": _Code()}, source / "pytorch_model.bin")
        message = refusal("from-hf", source, tmp_path / "own")
        assert "pytorch_model.bin" in message
        assert not Path("executed").exists()


def test_a_truncated_bin_is_named(tmp_path, model, tensors, tokenizer):
    source = write_hf(tmp_path / "source", model, tensors, tokenizer, suffix="bin")
    path = source / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "pytorch_model.bin is truncated, damaged" in refusal("from-hf", source, tmp_path / "own")


def test_defaults_of_transformers_are_named(tmp_path, source):
    config = json.loads((source / "config.json").read_text())
    for key in ("rope_theta", "rms_norm_eps", "max_position_embeddings"):
        del config[key]
    (source / "config.json").write_text(json.dumps(config))
    result = convert("from-hf", source, tmp_path / "own")
    assert result.exit_code == 0, result.output
    model = CheckpointReader(tmp_path / "own").model
    assert (model.rope_theta, model.norm_epsilon, model.max_positions) == (10000, 1e-6, 2048)
    origins = json.loads((tmp_path / "own" / RECEIPT).read_text())["origins"]
    assert origins["rope_theta"] == "transformers' default, no rope_theta in config.json"


def test_null_is_as_left_out(tmp_path, source):
    for key in ("rope_theta", "rms_norm_eps"):
        change(key, None)(source)
    change("max_position_embeddings", 4096)(source)
    result = convert("from-hf", source, tmp_path / "own")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    model = CheckpointReader(tmp_path / "own").model
    assert (model.rope_theta, model.norm_epsilon) == (10000, 1e-6)


@pytest.mark.parametrize("theta", [10000.0, None])
def test_a_long_context_with_a_small_rotary_base_is_warned_of(tmp_path, source, theta):
    change("rope_theta", theta)(source)
    result = convert("from-hf", source, tmp_path / "own")
    assert result.exit_code == 0, result.output
    (warning,) = json.loads((tmp_path / "own" / RECEIPT).read_text())["warnings"]
    assert result.stderr == f"warning: {warning}\n"
    assert warning.startswith("rope_theta is 10000 with 16384 positions; Code Llama of such a context has 1000000")
    assert CheckpointReader(tmp_path / "own").model.rope_theta == 10000


def test_the_option_overrides_the_rotary_base(tmp_path, source):
    """On both sides of the receipt: else they would disagree."""
    change("rope_theta", 10000.0)(source)
    result = convert("from-hf", source, tmp_path / "own", "--rope-theta", "1000000")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    receipt = json.loads((tmp_path / "own" / RECEIPT).read_text())
    assert receipt["warnings"] == []
    assert receipt["origins"]["rope_theta"] == (
        "the option --rope-theta, instead of 10000.0 (rope_theta in config.json)"
    )
    assert CheckpointReader(tmp_path / "own").model.rope_theta == 1e6


def test_values_that_another_type_cannot_hold_are_found(tmp_path, source):
    def enlarge(tensors):
        tensors["model.embed_tokens.weight"][615, 0] = 1e6  # of no token that the forwards see

    respell(enlarge)(source)
    assert convert("from-hf", source, tmp_path / "own").exit_code == 0
    result = convert("to-hf", tmp_path / "own", tmp_path / "back", "--dtype", "fp16")
    assert result.exit_code == 1
    assert "values: model.embed_tokens.weight holds values that are too large for fp16" in result.stderr
    assert not (tmp_path / "back").exists()


def test_another_vocabulary_in_tokenizer_json_is_found(tmp_path, source):
    convert("from-hf", source, tmp_path / "own")
    convert("to-hf", tmp_path / "own", tmp_path / "back")
    content = json.loads((tmp_path / "back" / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (source / "tokenizer.json").write_text(json.dumps(content))
    result = convert("from-hf", source, tmp_path / "again")
    assert result.exit_code == 1
    assert "2 rows have another piece than in the source's tokenizer.json" in result.stderr
    assert not (tmp_path / "again").exists()
    assert (temporary_folder(tmp_path / "again") / RECEIPT).exists()


def test_disagreement_exits_with_1(tmp_path, source, monkeypatch):
    monkeypatch.setattr(compare, "LOGIT_TOLERANCE", -1.0)
    result = convert("from-hf", source, tmp_path / "own")
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["model.norm.weight"], "model.norm.weight"),
        (["model.layers.1.mlp.up_proj.weight", Q], f"{Q} (and 1 more)"),
    ],
)
def test_weights_that_are_no_numbers_are_named(tmp_path, source, names, said, value):
    respell(lambda tensors: [tensors[name].view(-1)[3:4].fill_(value) for name in names])(source)
    result = convert("from-hf", source, tmp_path / "own")
    assert result.exit_code == 1
    assert f"logits: they are no numbers: {said} holds NaN or infinity" in result.stderr
    assert "nan" not in result.stderr


def test_again_needs_force(tmp_path, source):
    convert("from-hf", source, tmp_path / "own")
    assert "--force" in str(convert("from-hf", source, tmp_path / "own").exception)
    assert convert("from-hf", source, tmp_path / "own", "--force").exit_code == 0


def test_a_folder_is_no_tokenizer(tmp_path, source):
    said = refusal("from-hf", source, tmp_path / "own", "--tokenizer", source)
    assert said == f"{source} is a folder; name the model's SentencePiece file in it with --tokenizer"


def test_a_source_is_never_replaced_by_what_it_is_converted_to(tmp_path, source):
    assert convert("from-hf", source, tmp_path / "own").exit_code == 0
    for direction in ("to-hf", "from-hf"):
        folder = tmp_path / "own" if direction == "to-hf" else source
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert "is what is converted" in str(convert(direction, folder, folder, "--force").exception)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_full_disk_is_one_line(tmp_path, source, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megacode.checkpoint.tensorfile.os.fsync", full)
    assert "No space left on device" in refusal("from-hf", source, tmp_path / "own")
    monkeypatch.undo()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "has 1000 B free" in refusal("from-hf", source, tmp_path / "own")
