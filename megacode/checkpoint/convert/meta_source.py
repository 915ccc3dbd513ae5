"""Meta's own files of Llama 2 and Code Llama: params.json and consolidated.NN.pth, a file a model-parallel rank."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacode.checkpoint.convert.checklist import compare, read_checklist
from megacode.checkpoint.convert.source import model_of, read_settings, shapes_of
from megacode.checkpoint.convert.stored import Found, StoredFile, check_tensors, open_stored
from megacode.checkpoint.convert.weights import Progress
from megacode.checkpoint.tensorfile import sha256
from megacode.errors import UserError
from megacode.recipe import ModelSection

NAMES = {
    "self_attn.q_proj.weight": ("attention.wq.weight", 0),
    "self_attn.k_proj.weight": ("attention.wk.weight", 0),
    "self_attn.v_proj.weight": ("attention.wv.weight", 0),
    "self_attn.o_proj.weight": ("attention.wo.weight", 1),
    "mlp.gate_proj.weight": ("feed_forward.w1.weight", 0),
    "mlp.up_proj.weight": ("feed_forward.w3.weight", 0),
    "mlp.down_proj.weight": ("feed_forward.w2.weight", 1),
    "input_layernorm.weight": ("attention_norm.weight", None),
    "post_attention_layernorm.weight": ("ffn_norm.weight", None),
}
"""Name in a layer -> Meta's name, and the dimension along which ranks share it; None: each has it whole."""
_OUTSIDE = {
    "model.embed_tokens.weight": ("tok_embeddings.weight", 1),
    "model.norm.weight": ("norm.weight", None),
    "lm_head.weight": ("output.weight", 0),
}
_KNOWN = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps", "rope_theta"),
    *("vocab_size", "max_batch_size", "max_seq_len", "model_parallel_size"),
}
"""Keys of params.json; those of the second line say nothing about the weights."""
LONG_CONTEXT, SHORT_CONTEXT = 16384, 4096
"""Code Llama's context where its rotary base was raised, and Llama 2's (Roziere et al. 2023, section 2.4)."""


def meta_name(name: str) -> tuple[str, int | None]:
    """Meta's name of a parameter, and the dimension along which model-parallel ranks share it."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, _, layer, inner = name.split(".", 3)
    theirs, dim = NAMES[inner]
    return f"layers.{layer}.{theirs}", dim


def to_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k for interleaved rotary pairs -> for half-split ones.

    Meta turns rows (2i, 2i + 1) of a head together, HuggingFace and megacode (i, i + head_dim / 2).

    Args:
        weight: [heads * head_dim, hidden]
        heads: of what is rotated: query heads, or kv heads.
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_pairs(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `to_halves`."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def feed_forward_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """The rule of Meta's code: 2/3 of 4 dim, times the multiplier, rounded up to a multiple."""
    width = int(2 * 4 * dim / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * math.ceil(width / multiple_of)


class MetaSource:
    """See `Source`.

    Args:
        folder: with params.json and consolidated.00.pth and on.
        rope_theta: where params.json says none; left out, 10,000 as in Meta's code.
        max_positions: the context, of which params.json says nothing; left out, 16,384 where the rotary base was
            raised above 10,000, else 4,096.

    Raises:
        UserError: the folder holds no such model; names the key, the file or the tensor.
    """

    kind = "Meta"

    def __init__(self, folder: Path, rope_theta: float | None = None, max_positions: int | None = None) -> None:
        self.folder = folder
        path = folder / "params.json"
        params = read_settings(path)
        self._files = _open_files(folder)
        first = self._files[0]
        for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
            if len(first.shapes.get(name, ())) != 2:
                raise UserError(f"{first.path} lacks the matrix {name}; name a folder of Llama 2 or Code Llama")
        self.model, self.origins = read_params(
            path,
            params,
            rope_theta,
            max_positions,
            vocabulary=first.shapes["tok_embeddings.weight"][0],
            ffn=first.shapes["layers.0.feed_forward.w1.weight"][0] * len(self._files),
        )
        shapes = shapes_of(self.model)
        self._dims = dict(meta_name(name) for name in shapes)
        self.dtype = self._check(shapes)
        self.carried = [path]
        self._sums = read_checklist(folder, [file.path.name for file in self._files])
        self.origins["files"] = "no checklist.chk to compare with"
        self.warnings = []
        if self._sums is not None:
            self.origins["files"] = f"md5 of {', '.join(sorted(self._sums))} as in checklist.chk"
        elif len(self._files) > 1:
            self.warnings = [
                f"{folder} has no checklist.chk, so the order of the files is not proved: two of its "
                f"{len(self._files)} consolidated files that are swapped, or one of another model, would not be seen"
            ]

    def verify(self, progress: Progress) -> None:
        if self._sums is not None:
            compare(self.folder, self._sums, progress)

    def pieces(self, name: str) -> list[Tensor]:
        """One of each file; of what all have whole, that of the first."""
        theirs = meta_name(name)[0]
        return [file.read(theirs) for file in self._holders(name)]

    def places(self, name: str) -> list[tuple[Path, str]]:
        return [(file.path, meta_name(name)[0]) for file in self._holders(name)]

    def join(self, name: str, pieces: list[Tensor]) -> Tensor:
        dim = meta_name(name)[1]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim or 0)
        heads = self._rotated_heads(name)
        return to_halves(whole, heads) if heads else whole

    def split(self, name: str, whole: Tensor) -> list[Tensor]:
        dim, heads = meta_name(name)[1], self._rotated_heads(name)
        if heads:
            whole = to_pairs(whole, heads)
        return [whole] if dim is None else list(whole.chunk(len(self._files), dim))

    def _holders(self, name: str) -> list[StoredFile]:
        return self._files if meta_name(name)[1] is not None else self._files[:1]

    def _rotated_heads(self, name: str) -> int:
        """By how many heads the rows are permuted; 0: they are not."""
        return {"q_proj": self.model.heads, "k_proj": self.model.kv_heads}.get(name.split(".")[-2], 0)

    def _check(self, expected: dict[str, tuple[int, ...]]) -> torch.dtype:
        """Every file against the share of the model that it should hold; what all hold whole must be equal."""
        count = len(self._files)
        dtypes = []
        for file in self._files:
            share = {}
            for name, shape in expected.items():
                theirs, dim = meta_name(name)
                if dim is not None and shape[dim] % count:
                    raise UserError(
                        f"{self.folder} has {count} consolidated files, among which {theirs} with {shape[dim]} in "
                        f"dimension {dim} cannot be shared; one is missing or surplus"
                    )
                share[theirs] = tuple(size // count if axis == dim else size for axis, size in enumerate(shape))
            names = [name for name in file.shapes if name != "rope.freqs"]
            found: Found = {name: (file.path, file.shapes[name], file.dtypes[name]) for name in names}
            dtypes.append(check_tensors(found, share))
        if len(set(dtypes)) > 1:
            raise UserError(
                f"{self.folder}: the consolidated files are of different types ({dtypes}); fetch them again"
            )
        for theirs, dim in self._dims.items():
            if dim is None and len({sha256(file.read(theirs)) for file in self._files}) > 1:
                raise UserError(f"{self.folder}: {theirs} differs among the consolidated files; fetch them again")
        return dtypes[0]


def read_params(
    path: Path,
    params: dict[str, Any],
    rope_theta: float | None,
    max_positions: int | None,
    *,
    vocabulary: int,
    ffn: int,
) -> tuple[ModelSection, dict[str, str]]:
    """The shape that a params.json describes, and where what is often guessed came from.

    Args:
        path, params: the file and what it holds.
        rope_theta, max_positions: as of `MetaSource`.
        vocabulary, ffn: rows of the embedding and of w1, which the file need not say.

    Raises:
        UserError: a key is missing, unknown, or contradicts the tensors or an option.
    """
    unknown = sorted(params.keys() - _KNOWN)
    if unknown:
        raise UserError(
            f"{path}: {unknown[0]} = {params[unknown[0]]!r} is unknown; name a folder of Llama 2 or Code Llama"
        )
    lacking = [key for key in ("dim", "n_layers", "n_heads", "norm_eps", "multiple_of") if key not in params]
    if lacking:
        raise UserError(f"{path} lacks {', '.join(lacking)}; take the file that came with the weights")
    if params.get("vocab_size", -1) not in (-1, vocabulary):
        raise UserError(
            f"{path}: vocab_size is {params['vocab_size']} and tok_embeddings.weight has {vocabulary} rows; fetch the "
            f"files again"
        )
    width = feed_forward_width(params["dim"], params["multiple_of"], params.get("ffn_dim_multiplier"))
    if width != ffn:
        raise UserError(
            f"{path} gives a feed-forward width of {width} (dim, multiple_of, ffn_dim_multiplier) and "
            f"layers.0.feed_forward.w1.weight has {ffn} rows in all files; a file is missing or of another model"
        )
    theta, theta_origin = _rope_theta(path, params.get("rope_theta"), rope_theta)
    raised = theta > 10000
    origins = {
        "rope_theta": theta_origin,
        "max_positions": f"the context of {'Code Llama' if raised else 'Llama 2'}, as rope_theta says",
        "ffn": "rows of w1; the rule of Meta's code gives the same",
        "vocabulary": "rows of tok_embeddings",
    }
    if max_positions is not None:
        origins["max_positions"] = "the option --max-positions"
    return (
        model_of(
            path,
            layers=params["n_layers"],
            hidden=params["dim"],
            heads=params["n_heads"],
            kv_heads=params.get("n_kv_heads") or params["n_heads"],
            ffn=ffn,
            vocabulary=vocabulary,
            norm_epsilon=params["norm_eps"],
            rope_theta=theta,
            max_positions=max_positions or (LONG_CONTEXT if raised else SHORT_CONTEXT),
        ),
        origins,
    )


def _rope_theta(path: Path, given: float | None, option: float | None) -> tuple[float, str]:
    if given is None:
        default = (10000.0, "the default of Meta's code, none in params.json")
        return default if option is None else (float(option), "the option --rope-theta, none in params.json")
    if option not in (None, given):
        raise UserError(f"--rope-theta is {option} and rope_theta in {path} is {given}; leave the option out")
    return float(given), "rope_theta in params.json"


def _open_files(folder: Path) -> list[StoredFile]:
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths:
        raise UserError(f"{folder} holds no consolidated.00.pth; name a folder of Meta's files")
    expected = [f"consolidated.{number:02d}.pth" for number in range(len(paths))]
    missing = sorted(set(expected) - {path.name for path in paths})
    if missing:
        raise UserError(f"{folder} lacks {missing[0]}, the files up to {paths[-1].name} are there; fetch it")
    return [open_stored(path) for path in paths]
