"""What goes wrong on one rank, and where. A module that the ranks' processes can import by its name."""

import time

from support.stalling import at_call, stop_here


def in_a_tensor_collective():
    import torch.distributed as dist

    at_call(dist, "all_reduce", 20, stop_here, when=lambda *args, **kwargs: kwargs.get("async_op"))


def in_a_transfer():
    import torch.distributed as dist

    original, calls = dist.irecv, 0

    class Stopping:
        def __init__(self, work):
            self.work = work

        def wait(self):
            nonlocal calls
            calls += 1
            if calls == 6:  # of four micro-batches a step
                stop_here()
            return self.work.wait()

    dist.irecv = lambda *args, **kwargs: Stopping(original(*args, **kwargs))


def before_the_process_group():
    from megacode.train import main

    at_call(main, "start_process_group", 1, stop_here)


def in_the_engines_construction():
    from megacode.engine import zero

    at_call(zero, "build_chunks", 1, stop_here)


def in_the_data_loader():
    from megacode.data.stream import TrainStream

    at_call(TrainStream, "micro_batch", 5, lambda: time.sleep(100))


def in_a_collective_of_deepspeed():
    import torch.distributed as dist

    # The gradient norm, a scalar, is summed over the data ranks.
    at_call(dist, "all_reduce", 1, stop_here, when=lambda tensor, *args, **kwargs: tensor.numel() == 1)


def slow_forward():
    from megacode.model.llama import Llama

    original = Llama.forward

    def slowed(self, *args, **kwargs):
        time.sleep(0.15)
        return original(self, *args, **kwargs)

    Llama.forward = slowed


def other_parameters():
    from megacode.train import main

    original = main.ZeroEngine

    def changed(*args, **kwargs):
        engine = original(*args, **kwargs)
        name = next(iter(engine.parameters))
        engine.parameters[name] = engine.parameters[name].detach().double()
        return engine

    main.ZeroEngine = changed
