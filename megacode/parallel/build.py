"""Recipe + mesh -> this rank's chunks of the model."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from megacode.errors import UserError
from megacode.kernels.attention import Segments
from megacode.kernels.dispatch import Choice, Task, UnservableError, choose, choose_all, task
from megacode.model.layers import PlainLayers
from megacode.model.llama import Llama
from megacode.parallel.context import ContextAttention
from megacode.parallel.mesh import Mesh
from megacode.parallel.tensor import TensorLayers
from megacode.plan.layout import Layout
from megacode.recipe import Recipe


class Chunks(nn.Module):
    """The chunks of one pipeline rank, as the one module that its engine holds."""

    def __init__(self, chunks: list[Llama], choices: Mapping[str, Choice]) -> None:
        super().__init__()
        self.chunks, self.choices = nn.ModuleList(chunks), choices

    def forward(
        self,
        chunk: int,
        x: Tensor,
        positions: Tensor,
        segments: Segments | None,
        labels: Tensor | None,
        loss_scale: Tensor | None = None,
    ) -> Tensor:
        """See Llama.forward."""
        return self.chunks[chunk](x, positions, segments, labels, loss_scale)

    def global_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(global name, parameter) of all chunks."""
        for chunk in self.chunks:
            yield from chunk.named_parameters()


def build_chunks(recipe: Recipe, layout: Layout, mesh: Mesh, device: torch.device, dtype: torch.dtype) -> Chunks:
    """This rank's chunks, weights uninitialised. The caller sets default device and dtype, or zero.Init, around it.

    UserError when a kernel that the recipe asks for cannot serve here.
    """
    recompute, split_sequence = recipe.parallel.recompute, recipe.parallel.sequence
    choices = choose_kernels(recipe, device, dtype)
    layers = (
        TensorLayers(mesh, device, dtype, recompute, split_sequence, choices)
        if mesh.tensor > 1
        else PlainLayers(device, dtype, recompute, choices)
    )
    if mesh.context_group is not None:
        layers.attention = ContextAttention(mesh.context_group, layers.attention, keep=recompute == "full")
    num_stages = len(layout.stages)
    return Chunks(
        [
            Llama(recipe.model, layers, layout.stages[stage], first=stage == 0, last=stage == num_stages - 1)
            for stage in range(mesh.pipeline_rank, num_stages, mesh.pipeline)
        ],
        choices,
    )


def with_served_kernels(
    recipe: Recipe, device: torch.device, dtype: torch.dtype
) -> tuple[Recipe, dict[str, UnservableError]]:
    """The recipe with `auto` for each kernel that it names and that cannot serve here, and why these cannot."""
    refused = {}
    for operation, backend in recipe.kernels.model_dump().items():
        try:
            choose(operation, _task(recipe, device, dtype), backend)
        except UnservableError as error:
            refused[operation] = error
    kernels = recipe.kernels.model_copy(update=dict.fromkeys(refused, "auto"))
    return recipe.model_copy(update={"kernels": kernels}), refused


def choose_kernels(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> dict[str, Choice]:
    """The backend of each operation of the model, by its name in `dispatch.TABLE`.

    UserError when one that the recipe names cannot serve; says why.
    """
    try:
        return choose_all(_task(recipe, device, dtype), recipe.kernels.model_dump())
    except UnservableError as error:
        raise UserError(f"kernels: {error}") from None


def _task(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Task:
    shape = {"head_dim": recipe.model.head_dim, "hidden": recipe.model.hidden}
    return task(device, dtype, **shape, segments=recipe.data.document_masks or recipe.parallel.context > 1)
