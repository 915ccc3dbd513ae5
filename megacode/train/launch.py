"""Who this process is among those that a launcher started, and the device and process group that follow from it."""

import fcntl
import os
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megacode.errors import UserError

_SIOCGIFADDR = 0x8915
"""Linux: the address of an interface."""


@dataclass(frozen=True)
class Place:
    """This process among the others, as deepspeed, torchrun or srun say it; a process started by hand is alone."""

    rank: int
    local_rank: int
    world_size: int
    local_size: int
    """Processes on this machine."""


def find_place(local_rank: int | None = None) -> Place:
    """Read the launcher's variables, and set those that torch.distributed reads where only SLURM's are there.

    Args:
        local_rank: what the deepspeed launcher gives on the command line.

    Raises:
        UserError: srun started several tasks and the address of the first is unknown.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))  # set within an srun step only
    if "RANK" not in os.environ and tasks > 1:
        if "MASTER_ADDR" not in os.environ:
            raise UserError(
                "srun started several tasks and MASTER_ADDR is not set; use megacode submit, or in your own script: "
                'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
            )
        os.environ |= {
            "RANK": os.environ["SLURM_PROCID"],
            "LOCAL_RANK": os.environ["SLURM_LOCALID"],
            "WORLD_SIZE": str(tasks),
            "LOCAL_WORLD_SIZE": str(_tasks_here(tasks)),
        }
    for name, value in {"RANK": "0", "LOCAL_RANK": str(local_rank or 0), "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(name, value)
    world_size = int(os.environ["WORLD_SIZE"])
    # A process that is alone meets nobody: any free port is right.
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500" if world_size > 1 else "0"}.items():
        os.environ.setdefault(name, value)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)
    return Place(int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), world_size, local_size)


def _tasks_here(tasks: int) -> int:
    """Tasks of this srun step on this node. SLURM writes those of all its nodes as "2(x3),1": three nodes with two, one
    with one.
    """
    counts: list[int] = []
    for group in os.environ.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)).split(","):
        count, _, times = group.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts[int(os.environ.get("SLURM_NODEID", "0"))]


def find_device(place: Place) -> torch.device:
    """A GPU for each process, or the CPU where there is none or DS_ACCELERATOR=cpu, which DeepSpeed obeys, asks for it.

    Raises:
        UserError: more processes than GPUs.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if place.local_rank >= torch.cuda.device_count():
        if "SLURM_GPUS_PER_TASK" in os.environ and torch.cuda.device_count() == 1:
            raise UserError(
                "srun gave each task one GPU that the others do not see (--gpus-per-task); ask for --gpus-per-node, so "
                "that all tasks of a node see all of its GPUs, as NCCL wants it"
            )
        raise UserError(
            f"{place.local_size} processes were started here and there are {torch.cuda.device_count()} GPUs; start as "
            f"many processes, or set DS_ACCELERATOR=cpu"
        )
    return torch.device("cuda", place.local_rank)


def find_interface(address: str) -> str | None:
    """The network interface that leads to an address (IPv4); None where it can't be told.

    A name that stands for the loopback address on its own machine only (Debian's 127.0.1.1) tells nothing: other
    machines see it behind another interface.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing: the kernel chooses a route
            own = probe.getsockname()[0]
            if own.startswith("127."):
                return "lo" if address == "localhost" or address.startswith("127.") else None
            for _, name in socket.if_nameindex():
                with suppress(OSError):  # it has no address
                    reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
                    if socket.inet_ntoa(reply[20:24]) == own:
                        return name
    except OSError:
        pass
    return None


def start_process_group(place: Place, device: torch.device, timeout_seconds: float) -> None:
    """NCCL on GPUs, else gloo. Collective.

    Raises:
        UserError: rank 0, which the others are to meet at MASTER_PORT, finds it taken.
    """
    # gloo guesses an interface from the host's name, and at random waits for ever on a host with odd ones.
    if "GLOO_SOCKET_IFNAME" not in os.environ and (interface := find_interface(os.environ["MASTER_ADDR"])) is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    timeout = timedelta(seconds=timeout_seconds)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif place.local_size > 1 or "OMP_NUM_THREADS" not in os.environ:  # launchers set it to 1 where there are several
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.local_size))
    try:
        if device.type == "cuda":
            dist.init_process_group("nccl", timeout=timeout, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=timeout)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"MASTER_PORT {os.environ['MASTER_PORT']} is in use on this machine, by another run perhaps; set "
            f"MASTER_PORT to a free port (deepspeed --master_port, torchrun --master-port)"
        ) from None
