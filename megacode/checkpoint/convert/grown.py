"""A source with the sixteen rows more that infilling needs (Llama 2, and Code Llama's variants of 32,000 rows)."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megacode.checkpoint.convert.source import Source
from megacode.checkpoint.convert.weights import Progress
from megacode.data.tokenizer import NUM_APPENDED_ROWS

NewRows = Literal["mean", "normal"]
"""What the new rows are: the mean of the old ones; or drawn independently, with mean and deviation of the old ones."""
ROW_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
"""What has a row for each piece of the tokenizer."""


class Grown:
    """Another source whose embedding and head have `NUM_APPENDED_ROWS` more; see `Source`."""

    def __init__(self, source: Source, new_rows: NewRows) -> None:
        self.source, self.new_rows = source, new_rows
        self.kind, self.folder, self.dtype = source.kind, source.folder, source.dtype
        self.carried, self.warnings = source.carried, source.warnings
        assert source.model.vocabulary is not None
        self.old_rows = source.model.vocabulary
        self.model = source.model.model_copy(update={"vocabulary": self.old_rows + NUM_APPENDED_ROWS})
        self.origins = {
            **source.origins,
            "new_rows": f"{NUM_APPENDED_ROWS}, {new_rows} of the {self.old_rows} old ones",
        }

    def verify(self, progress: Progress) -> None:
        self.source.verify(progress)

    def pieces(self, name: str) -> list[Tensor]:
        return self.source.pieces(name)

    def places(self, name: str) -> list[tuple[Path, str]]:
        return self.source.places(name)

    def join(self, name: str, pieces: list[Tensor]) -> Tensor:
        whole = self.source.join(name, pieces)
        return torch.cat([whole, _rows(whole, self.new_rows)]) if name in ROW_TENSORS else whole

    def split(self, name: str, whole: Tensor) -> list[Tensor]:
        return self.source.split(name, whole[: self.old_rows] if name in ROW_TENSORS else whole)


def _rows(whole: Tensor, kind: NewRows) -> Tensor:
    """[rows, hidden] -> [NUM_APPENDED_ROWS, hidden], always the same for the same rows."""
    blocks = whole.split(1024)  # sums in fp64, a stretch in memory at a time
    mean = sum((block.double().sum(0) for block in blocks), torch.zeros(whole.shape[1]).double()) / len(whole)
    rows = mean.expand(NUM_APPENDED_ROWS, -1)
    if kind == "normal":
        squares = sum(((block.double() - mean).square().sum(0) for block in blocks), torch.zeros_like(mean))
        drawn = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        rows = rows + drawn * (squares / len(whole)).sqrt()
    return rows.to(whole.dtype)
