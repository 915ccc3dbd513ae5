"""All checks, in order."""

import os
from collections.abc import Callable, Iterator
from typing import Any

from megacode.doctor import versions
from megacode.doctor.finding import Finding
from megacode.doctor.processes import Processes, RanksError
from megacode.doctor.report import Report

CPU_PROCESSES = 4
RANKS_MEND = "training would fail or hang there too; NCCL_DEBUG=INFO and TORCH_DISTRIBUTED_DEBUG=DETAIL say more"


def run(report: Report, num_processes: int | None, quick: bool) -> None:
    """Fill the report.

    Args:
        report: where findings go.
        num_processes: processes of the last section; None: one a GPU where there are at least two, else 4 on the CPU.
        quick: leave out the last section, which starts processes.
    """
    environment = dict(os.environ)
    report.add("versions", versions.check_packages())
    if not report.exit_code:
        import torch

        from megacode.doctor.machine import training_device

        device = training_device()
        if device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed else looks for accelerators, and says so
        report.add("versions", iter([versions.check_deepspeed()]))
    if report.exit_code:  # what follows imports them
        report.add("all other checks", iter([Finding("", "skipped", "first mend the packages above")]))
        return
    _one_process(report, device, environment)
    if quick:
        return
    num_gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    cuda = num_gpus >= (num_processes or 2)
    num_processes = num_processes or (num_gpus if cuda else CPU_PROCESSES)
    section = f"self-tests on {num_processes} {'GPUs, NCCL' if cuda else 'CPU processes, gloo'}, against one process"
    with Processes(num_processes, cuda) as processes:
        report.add(section, check_in_processes(processes.run, num_processes, parallel_checks()))


def _one_process(report: Report, device: Any, environment: dict[str, str]) -> None:
    """The checks that import torch and DeepSpeed and start no process."""
    from megacode.doctor import kernels, leakage, machine

    report.add("versions", iter([versions.check_flash_attn(device.type == "cuda"), versions.check_apex()]))
    report.add("versions", machine.check_machine(device, environment))
    report.add("kernels", kernels.check_backends(device))
    report.add("kernels", iter([kernels.check_optimizer(device)]))
    report.add("self-tests in one process", kernels.check_twins(device))
    report.add("self-tests in one process", leakage.check_leakage(device))


def parallel_checks() -> dict[str, Callable[..., Iterator[Finding]]]:
    """The checks that need a world, in order."""
    from megacode.doctor import layouts, links

    return {
        "layouts": layouts.check_layouts,
        "clipping": layouts.check_clipping,
        "bf16, fp32 masters": layouts.check_masters,
        "links": links.check_links,
    }


def check_in_processes(
    run: Callable[..., list[Any]], num_processes: int, checks: dict[str, Callable[..., Iterator[Finding]]]
) -> Iterator[Finding]:
    """Checks that need a world; one whose ranks fail does not keep the others from being tried."""
    for name, check in checks.items():
        try:
            yield from check(run, num_processes)
        except RanksError as error:
            yield Finding(name, "WRONG", str(error), RANKS_MEND)
