"""Which process groups a mesh makes."""

from types import SimpleNamespace
from unittest import mock

import pytest

from megacode.parallel import mesh as meshes


def build(rank, pipeline, data, tensor, context):
    """A rank's mesh whose groups are their ranks, and the groups that were made, without processes."""
    made = []

    def new_group(ranks=None, **_):
        made.append(None if ranks is None else tuple(ranks))
        return made[-1]

    world = pipeline * data * tensor * context
    dist = SimpleNamespace(
        get_rank=lambda: rank, get_world_size=lambda: world, get_backend=lambda: "nccl", new_group=new_group,
        group=SimpleNamespace(WORLD=tuple(range(world))),
    )  # fmt: skip
    with mock.patch.object(meshes, "dist", dist):
        return meshes.build_mesh(pipeline, data, tensor, context), made


@pytest.mark.parametrize(
    ("sizes", "num_groups"),
    [
        # data x context, pipeline x tensor, context, tensor, the control group, two a pair of neighbour stages
        ((1, 8, 1, 1), 1 + 8 + 1),
        ((8, 1, 1, 1), 8 + 1 + 1 + 16),
        ((1, 2, 4, 1), 4 + 2 + 2 + 1),
        ((1, 2, 1, 4), 1 + 8 + 2 + 1),
        ((2, 2, 2, 1), 4 + 2 + 4 + 1 + 2 * 4),
        ((1, 1, 2, 2), 2 + 2 + 2 + 2 + 1),
    ],
    ids=str,
)
def test_no_group_is_made_that_nothing_is_sent_in(sizes, num_groups):
    mesh, made = build(3, *sizes)
    assert len(made) == num_groups
    lengths = [None if group is None else len(group) for group in (mesh.context_group, mesh.tensor_group)]
    assert lengths == [size if size > 1 else None for size in (sizes[3], sizes[2])]
    # DeepSpeed reduces in these two, whatever their size.
    assert len(mesh.data_group) == sizes[1] * sizes[3]
    assert len(mesh.model_group) == sizes[0] * sizes[2]
