"""All checks, in order."""

import os

from megacode.doctor.finding import Finding
from megacode.doctor.report import Report


def run(report: Report, num_processes: int | None, quick: bool) -> None:
    """Fill the report.

    Args:
        report: where findings go.
        num_processes: processes of the last section; None: one a GPU where there are at least two, else 4 on the CPU.
        quick: leave out the last section, which starts processes.
    """
    from megacode.doctor import versions

    environment = dict(os.environ)
    report.add("versions", versions.check_packages())
    if not report.exit_code:
        if not _has_gpu():
            os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed else looks for accelerators, and says so
        report.add("versions", iter([versions.check_deepspeed()]))
    if report.exit_code:  # what follows imports them
        report.add("all other checks", iter([Finding("", "skipped", "first mend the packages above")]))
        return
    from megacode.doctor import kernels, leakage, machine

    device = machine.training_device()
    report.add("versions", iter([versions.check_flash_attn(device.type == "cuda"), versions.check_apex()]))
    report.add("versions", machine.check_machine(device, environment))
    report.add("kernels", kernels.check_backends(device))
    report.add("self-tests in one process", kernels.check_twins(device))
    report.add("self-tests in one process", leakage.check_leakage(device))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
