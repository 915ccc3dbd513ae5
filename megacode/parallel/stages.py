"""Which layers stand on which pipeline stage. Pure, no torch."""


def split_layers(num_layers: int, num_stages: int) -> list[range]:
    """Consecutive, non-empty ranges of layers, one a stage, sizes differing by at most one.

    Stages that get one layer more are the later ones, but the last one comes last: early stages hold more activations
    in flight under 1F1B, and the last stage has the head to compute.
    """
    assert 0 < num_stages <= num_layers
    base, extra = divmod(num_layers, num_stages)
    order = [*range(num_stages - 2, -1, -1), num_stages - 1]
    longer = set(order[:extra])
    stages, start = [], 0
    for stage in range(num_stages):
        stop = start + base + (stage in longer)
        stages.append(range(start, stop))
        start = stop
    return stages
