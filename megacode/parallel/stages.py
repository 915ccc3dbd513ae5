"""Which layers stand on which pipeline stage. Pure, no torch."""


def split_layers(num_layers: int, num_stages: int, ends: int = 0) -> list[range]:
    """Consecutive, non-empty ranges of layers, one a stage, of weights that differ by at most one where that can be.

    Stages that get one layer more are the later ones, but the last one comes last: early stages hold more activations
    in flight under 1F1B, and the last stage has the head to compute.

    Args:
        num_layers: to split.
        num_stages: at most `num_layers`.
        ends: how many layers the embedding, on the first stage, and the head, on the last, each weigh.
    """
    assert 0 < num_stages <= num_layers
    order = [*range(num_stages - 2, -1, -1), num_stages - 1]
    sizes = [1] * num_stages
    weights = [1 + ends * ((stage == 0) + (stage == num_stages - 1)) for stage in range(num_stages)]
    for _ in range(num_layers - num_stages):
        lightest = min(order, key=weights.__getitem__)
        sizes[lightest] += 1
        weights[lightest] += 1
    stages, start = [], 0
    for size in sizes:
        stop = start + size
        stages.append(range(start, stop))
        start = stop
    return stages
