"""The machine: devices, compilers, and the limits and variables that make communication libraries fail or hang."""

import os
import resource
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import torch

from megacode.doctor.finding import Finding, verdict

GIB = 2**30
SHARED_MEMORY_BYTES = GIB
"""NCCL keeps buffers for the ranks of a machine in /dev/shm; its manual asks for 1g (containers give 64 MB)."""
OPEN_FILES = 4096
"""Every rank of NCCL holds some sockets to every other one, beside the shards; 1024 is a common limit."""
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "DS_ACCELERATOR",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "NCCL_IB_DISABLE",
    "NCCL_P2P_DISABLE",
)


def training_device() -> torch.device:
    """Where training would run: as megacode.train.launch chooses it."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")


def check_machine(device: torch.device, environment: dict[str, str]) -> Iterator[Finding]:
    """All of it."""
    cuda = device.type == "cuda"
    yield from check_devices(cuda, driver_version())
    yield from check_compilers(cuda)
    yield check_nccl(cuda)
    yield check_shared_memory(cuda, shutil.disk_usage("/dev/shm").total)
    yield from check_limits(cuda)
    yield from check_variables(environment, [name for _, name in socket.if_nameindex()])
    yield from check_extension_locks(extension_folder())


def driver_version() -> str | None:
    """Of NVIDIA's kernel driver, or None where there is none."""
    path = Path("/proc/driver/nvidia/version")
    if not path.is_file():
        return None
    words = path.read_text(encoding="utf-8").split()
    return next((word for word in words if word[:1].isdigit() and "." in word), "of unknown version")


def check_devices(cuda: bool, driver: str | None) -> Iterator[Finding]:
    """GPUs with their memory; a driver without a usable torch would silently train on the CPU."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    if driver is None:
        yield Finding("torch's build", "ok", build)
        yield Finding("GPU", "skipped", "no NVIDIA driver: training runs on the CPU")
        return
    visible = torch.cuda.is_available()
    yield verdict(
        "torch's build",
        visible,
        f"{build}; NVIDIA driver {driver}; torch {'sees' if visible else 'does not see'} a GPU",
        "training would run on the CPU: install the torch wheel for this driver, and look at CUDA_VISIBLE_DEVICES",
    )
    if not cuda:
        yield Finding("GPU", "skipped", "training runs on the CPU: DS_ACCELERATOR=cpu, or torch sees none")
        return
    for index in range(torch.cuda.device_count()):
        free_bytes, all_bytes = torch.cuda.mem_get_info(index)
        text = f"{torch.cuda.get_device_name(index)}, {free_bytes / GIB:.1f} of {all_bytes / GIB:.1f} GiB free"
        yield Finding(f"GPU {index}", "ok", text)


def check_compilers(cuda: bool) -> Iterator[Finding]:
    """None is needed, but for Triton's: it compiles its launcher with the system's C compiler on first use."""
    for name in ("gcc", "g++", "nvcc"):
        path = shutil.which(name)
        needed = cuda and name == "gcc"
        if path is not None:
            yield Finding(name, "ok", path + ("" if needed else "; not needed"))
        elif needed:
            yield Finding(name, "missing", "Triton needs it on a GPU", "install gcc (apt-get install gcc)")
        else:
            yield Finding(name, "missing", "not needed: megacode has nothing to compile")


def check_nccl(cuda: bool) -> Finding:
    """NCCL comes with torch's CUDA build."""
    if not cuda:
        return Finding("NCCL", "skipped", "is for GPUs; CPU processes talk through gloo")
    if not torch.distributed.is_nccl_available():
        return Finding("NCCL", "WRONG", "this torch was built without it", "install torch from pytorch.org's wheels")
    return Finding("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))


def check_shared_memory(cuda: bool, size_bytes: int) -> Finding:
    """/dev/shm, which containers make small."""
    text = f"{size_bytes / GIB:.2f} GiB"
    if not cuda or size_bytes >= SHARED_MEMORY_BYTES:
        return Finding("/dev/shm", "ok", text)
    return Finding("/dev/shm", "missing", f"{text}; NCCL may fail to start below 1 GiB", "docker run --shm-size=1g")


def check_limits(cuda: bool) -> Iterator[Finding]:
    """memlock (InfiniBand registers its buffers) and nofile."""
    memory_bytes, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = memory_bytes == resource.RLIM_INFINITY
    text = "unlimited" if unlimited else f"{memory_bytes / 2**20:.0f} MiB"
    if unlimited or not cuda:
        yield Finding("ulimit memlock", "ok", text)
    else:
        yield Finding(
            "ulimit memlock",
            "missing",
            f"{text}; NCCL over InfiniBand fails or hangs below unlimited",
            "ulimit -l unlimited (docker run --ulimit memlock=-1)",
        )
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files >= OPEN_FILES or not cuda:
        yield Finding("ulimit nofile", "ok", str(files))
    else:
        yield Finding("ulimit nofile", "missing", f"{files}; too few for many ranks", f"ulimit -n {OPEN_FILES}")


def check_variables(environment: dict[str, str], interfaces: list[str]) -> Iterator[Finding]:
    """Variables that decide where ranks run and how they talk; an interface that does not exist is a hang."""
    unset = [name for name in VARIABLES if name not in environment]
    for name in sorted(set(VARIABLES) - set(unset)):
        value = environment[name]
        if name.endswith("IFNAME") and not _some_interface(value, interfaces, prefixes=name.startswith("NCCL")):
            yield Finding(name, "WRONG", f"{value}: no such network interface", f"take one of {', '.join(interfaces)}")
        else:
            yield Finding(name, "ok", value)
    yield Finding("not set", "ok", ", ".join(unset))


def _some_interface(value: str, interfaces: list[str], prefixes: bool) -> bool:
    """Whether the variable's value leaves an interface.

    gloo takes exact names. NCCL takes beginnings of names, exact names after `=`, and a leading `^` excludes.
    """
    exclude = prefixes and value.startswith("^")
    value = value[1:] if exclude else value
    exact = not prefixes or value.startswith("=")
    names = value.removeprefix("=").split(",")
    hit = [i for i in interfaces if any(i == n if exact else i.startswith(n) for n in names)]
    return len(hit) < len(interfaces) if exclude else bool(hit)


def extension_folder() -> Path:
    """Where torch, and so DeepSpeed, builds C++ extensions."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def check_extension_locks(folder: Path) -> Iterator[Finding]:
    """A killed build leaves its lock, and whoever next builds the same extension waits for it for ever, silently."""
    locks = sorted([*folder.glob("*/lock"), *folder.glob("*/*/lock")])
    held = _open_files() if locks else set()
    for lock in locks:
        if lock.resolve() in held:
            yield Finding("extension lock", "ok", f"{lock}: a build is running")
        else:
            text = f"{lock} is of a killed build; the next start that compiles it would hang"
            yield Finding("extension lock", "WRONG", text, f"rm {lock}")
    if not locks:
        yield Finding("extension lock", "ok", f"none in {folder}")


def _open_files() -> set[Path]:
    """Files that this user's processes hold open: the builder keeps its lock open for as long as it builds."""
    found = set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found.add(descriptor.readlink())
        except OSError:  # gone meanwhile, or another user's
            continue
    return found
