"""SentencePiece BPE in Code Llama's manner: byte fallback, no normalisation, sixteen rows behind the trained ones.

Code Llama took Llama's 32,000 rows and appended sixteen; row base + 7 is the prefix piece of infilling, then suffix,
middle and end-of-infill, and base + 15 is the step piece of the 70B chat format. `train` builds the same at any size.

What comes back from `decode(encode(text))`: every text, character for character, except that U+2581 (SentencePiece's
own sign for a space) comes back as a space. A text with lone surrogates is no Unicode text: `encode` raises.
"""

import functools
import hashlib
import io
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer, sentencepiece_model_pb2

from megacode.data import engines
from megacode.data.engines import Engine, Ids
from megacode.data.joints import in_stretches
from megacode.errors import UserError

PREFIX, SUFFIX, MIDDLE, END_OF_INFILL = "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"
STEP = "<step>"
NUM_APPENDED_ROWS = 16
_APPENDED = {7: PREFIX, 8: SUFFIX, 9: MIDDLE, 10: END_OF_INFILL, 15: STEP}

_RESERVED_BY_TRAINER = "▅"  # U+2585: the trainer silently drops every document that has it
_MAX_DOCUMENT_BYTES = 2**30  # the trainer's own limit; longer documents are skipped


class Tokenizer:
    """A SentencePiece model, read from `path`.

    Ids are SentencePiece's; a faster engine computes them where one is installed that gives the same (`engine`).

    Args:
        path: The model's file.
        oracle: Let SentencePiece itself compute, whatever is installed.
        known: Name of the engine that another process found to give SentencePiece's ids; it is not probed again.

    Attributes:
        path: The model's file.
        sha256: Hash of the file, in hex; shards keep it to know which tokenizer made them.
        model: The parsed ModelProto; whatever text must not reach is a control or unknown piece in it.
        vocabulary: Number of rows, the appended ones included.
        bos, eos: Ids of the pieces that begin and end a document.
        prefix_id, suffix_id, middle_id, eot_id: Ids of the infilling pieces; None where absent (Code Llama 34B).

    Raises:
        UserError: the file is missing or is no SentencePiece model with BOS and EOS.
    """

    def __init__(self, path: str | Path, *, oracle: bool = False, known: str = "") -> None:
        self.path = Path(path)
        self.oracle, self.known = oracle, known
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the tokenizer {path}: {error.strerror}; name a SentencePiece model") from None
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.model = _parse(data, self.path)
        specials = {piece: _control_row(self.model, piece) for piece in (PREFIX, SUFFIX, MIDDLE, END_OF_INFILL)}
        self.prefix_id, self.suffix_id, self.middle_id, self.eot_id = specials.values()
        self._rows = SentencePieceProcessor(model_proto=self.model.SerializeToString())
        self.vocabulary = int(self._rows.vocab_size())
        self.bos, self.eos = int(self._rows.bos_id()), int(self._rows.eos_id())
        if self.bos < 0 or self.eos < 0:
            raise UserError(
                f"the tokenizer {path} has no BOS or no EOS piece; train one with `megacode tokenizer train`"
            )

    def __reduce__(self) -> tuple[Callable[..., "Tokenizer"], tuple[Path, bool, str]]:
        """Processes that are given a tokenizer read its file again."""
        return _reopen, (self.path, self.oracle, self.known)

    @functools.cached_property
    def engine(self) -> Engine:
        """What computes ids here; chosen at the first use, since a run without infilling encodes nothing."""
        if self.oracle:
            return engines.sentencepiece(self.model)
        return in_stretches(engines.fastest(self.model, probes(self), self.known), self.model)

    @property
    def has_infilling(self) -> bool:
        """Whether the model has all four infilling pieces."""
        return None not in (self.prefix_id, self.suffix_id, self.middle_id, self.eot_id)

    def encode(self, text: str) -> list[int]:
        """Ids of a text that begins a document: with SentencePiece's dummy prefix, without BOS and EOS."""
        return self.engine.document(text).tolist()

    def encode_array(self, text: str) -> Ids:
        """As `encode`: [tokens]."""
        return self.engine.document(text)

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that goes on where another one ended: without the dummy prefix (Code Llama section 2.3)."""
        return self.engine.continuation(text).tolist()

    def decode(self, ids: Sequence[int]) -> str:
        """The inverse of `encode`. BOS, EOS and the other control pieces give no text; broken UTF-8 gives U+FFFD."""
        return self.decode_continuation(ids).removeprefix(" ")

    def decode_continuation(self, ids: Sequence[int]) -> str:
        """The inverse of `encode_continuation`: as `decode`, but a leading space stays."""
        try:
            return b"".join(map(self._texts.__getitem__, ids)).decode()
        except UnicodeDecodeError:
            return self._continuation.decode(list(ids))

    def texts(self, ids: Iterable[int]) -> list[bytes]:
        """What each id gives when decoded, as UTF-8; an id may give a part of a character, or nothing."""
        return [self._texts[row] for row in ids]

    @functools.cached_property
    def _texts(self) -> list[bytes]:
        """What each row gives when decoded."""
        decode = self._continuation.decode
        return [
            bytes([int(piece.piece[3:5], 16)]) if piece.type == piece.BYTE else decode([row]).encode()
            for row, piece in enumerate(self.model.pieces)
        ]

    @functools.cached_property
    def _continuation(self) -> SentencePieceProcessor:
        return engines.processor(self.model, dummy_prefix=False)

    def piece(self, row: int) -> str:
        """The name of a row."""
        return self._rows.id_to_piece(row)

    def is_control(self, row: int) -> bool:
        """Whether a row is a control piece or the unknown piece, which no text may reach."""
        return bool(self._rows.is_control(row) or self._rows.is_unknown(row))


def train(texts: Iterable[str], output: str | Path, num_pieces: int = 4096, num_threads: int = 2) -> None:
    """Train a BPE model on whole documents and append the sixteen rows.

    Documents go in whole, not as lines: only so do line ends and runs of indentation become pieces. Equal documents in
    equal order give an equal file. All documents are held in memory. Tabs never become pieces: each is one byte token.

    Args:
        texts: Documents.
        output: The file to write; replaced when done.
        num_pieces: Rows of the base: unknown, BOS, EOS, 256 bytes and the learned pieces. The file has 16 more.
        num_threads: Threads of the trainer; the result does not depend on them.

    Raises:
        UserError: there is no text, or too little of it for so many pieces, or too few pieces for its characters.
    """
    output = Path(output)
    buffer = io.BytesIO()
    documents = _Documents(texts)
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(documents),
            model_writer=buffer,
            model_type="bpe",
            vocab_size=num_pieces,
            byte_fallback=True,
            normalization_rule_name="identity",
            split_digits=True,
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=_MAX_DOCUMENT_BYTES,
            num_threads=num_threads,
            minloglevel=3,
        )
    except RuntimeError as error:
        raise documents.failure or _trainer_error(str(error), num_pieces) from None
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(buffer.getvalue())
    _append_rows(model)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)


def with_infilling(path: Path) -> bytes:
    """The file of a model like the one at `path`, with the sixteen rows appended: Llama's becomes Code Llama's.

    Raises:
        UserError: the file is missing or is no SentencePiece model.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}; name a SentencePiece model") from None
    model = _parse(data, path)
    _append_rows(model)
    return bytes(model.SerializeToString(deterministic=True))


class _Documents:
    """What the trainer reads. It turns an exception of its input into one of its own: the true one is kept here."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.failure: BaseException | None = None
        self._texts = texts

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts:
                if text:
                    yield text.replace(_RESERVED_BY_TRAINER, " ")
        except (Exception, KeyboardInterrupt) as error:
            self.failure = error
            raise


def _append_rows(model: sentencepiece_model_pb2.ModelProto) -> None:
    """Append Code Llama's sixteen rows as control pieces: no text ever encodes to a control piece."""
    for row in range(NUM_APPENDED_ROWS):
        piece = model.pieces.add()
        # No learned piece can bear such a name: "<" and letters are different scripts and are never merged.
        piece.piece = _APPENDED.get(row, f"<reserved_{row}>")
        piece.score = 0.0
        piece.type = sentencepiece_model_pb2.ModelProto.SentencePiece.CONTROL
    model.trainer_spec.vocab_size = len(model.pieces)


def _trainer_error(message: str, num_pieces: int) -> UserError:
    """Say the trainer's complaint as a mend."""
    if "sentences_.empty()" in message:
        return UserError("there is no text to train the tokenizer on; check the inputs, --suffix and --text-field")
    if "too high" in message:
        limit = re.search(r"<= (\d+)", message)
        most = f"ask for at most {limit[1]} pieces" if limit else "ask for fewer pieces"
        return UserError(f"the text is too small for a tokenizer of {num_pieces} pieces; {most} or give more text")
    if "smaller than required_chars" in message:
        least = re.search(r"vs (\d+)", message)
        more = f"ask for at least {least[1]}" if least else "ask for more"
        return UserError(f"{num_pieces} pieces are too few for the bytes and the characters of the text; {more}")
    return UserError(f"the trainer refuses {num_pieces} pieces: {' '.join(message.split())}")


def _parse(data: bytes, path: Path) -> sentencepiece_model_pb2.ModelProto:
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(data)
        if not data:
            raise ValueError("it is empty")  # SentencePieceProcessor takes empty bytes for "load nothing"
        SentencePieceProcessor(model_proto=data)
    except Exception as error:  # protobuf's DecodeError lives at another place in each of its versions
        raise UserError(
            f"{path} is no SentencePiece model ({' '.join(str(error).split())}); name another file"
        ) from None
    return model


def _control_row(model: sentencepiece_model_pb2.ModelProto, name: str) -> int | None:
    """The row called `name`, made a control piece whatever type it had, so that text spelling it does not become it."""
    for row, piece in enumerate(model.pieces):
        if piece.piece == name:
            piece.type = sentencepiece_model_pb2.ModelProto.SentencePiece.CONTROL
            return row
    return None


def _reopen(path: Path, oracle: bool, known: str) -> Tokenizer:
    return Tokenizer(path, oracle=oracle, known=known)


def probes(tokenizer: Tokenizer, num_texts: int = 200) -> Iterator[str]:
    """Random texts, always the same, in which what tokenizers stumble over is frequent: names of control pieces too."""
    generator = random.Random(0)
    names = [tokenizer.piece(row) for row in range(tokenizer.vocabulary) if tokenizer.is_control(row)]
    letters = [*" \n\t\r\0▁<>/_aZ09é▅😀\u2028\ufeff\u0301中", "    ", "\r\n", "<0x0A>", "def ", "return", "=" * 9]
    for _ in range(num_texts):
        yield "".join(generator.choices(names + letters, k=generator.randrange(1, 12)))


def find_fault(tokenizer: Tokenizer, num_texts: int) -> str | None:
    """Try random texts that spell control pieces among other things: none may become one, each must come back, and the
    ids must be SentencePiece's.

    Returns:
        One line about the first text for which that fails, or None.
    """
    oracle = engines.sentencepiece(tokenizer.model)
    for text in probes(tokenizer, num_texts):
        for encode, decode, expected in (
            (tokenizer.encode, tokenizer.decode, oracle.document),
            (tokenizer.encode_continuation, tokenizer.decode_continuation, oracle.continuation),
        ):
            ids = encode(text)
            control = next((row for row in ids if tokenizer.is_control(row)), None)
            if control is not None:
                return f"the text {text!r} becomes the special piece {tokenizer.piece(control)!r}"
            if decode(ids) != text.replace("▁", " "):
                return f"the text {text!r} comes back as {decode(ids)!r}"
            if ids != expected(text).tolist():
                return f"{tokenizer.engine.name} gives the text {text!r} other ids than SentencePiece"
    return None
