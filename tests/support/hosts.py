"""Two "hosts" on this machine, each with a launcher of its own, as two machines would be started by hand."""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from support.launching import ENVIRONMENT, ROOT

NAMES = ("alpha", "beta")
_UNSHARE = ("unshare", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
_AS_HOST = 'hostname "$1" && mount -t tmpfs tmpfs /dev/shm && shift && exec "$@"'


@functools.cache
def separate() -> bool:
    """Whether a host gets a name, processes and shared memory of its own; where the system forbids that, both hosts are
    this machine under its own name."""
    command = [*_UNSHARE, "sh", "-c", _AS_HOST, "sh", "alpha", "hostname"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout == "alpha\n"
    except FileNotFoundError:
        return False


def deepspeed(folder: Path, port: int, node: int) -> list[str]:
    """A node of `deepspeed --hostfile`, a slot a host, without ssh."""
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in NAMES))
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--hostfile", str(hostfile)]
    return [*launcher, "--no_ssh", "--node_rank", str(node), "--master_addr", "127.0.0.1", "--master_port", str(port)]


def torchrun(folder: Path, port: int, node: int) -> list[str]:
    """A node of torchrun with the static rendezvous, a process a host."""
    launcher = [str(Path(sys.executable).with_name("torchrun")), "--nnodes", "2", "--nproc-per-node", "1"]
    return [*launcher, "--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)]


@contextlib.contextmanager
def hosts(launcher, folder: Path, arguments: Sequence[str]) -> Iterator[list[subprocess.Popen]]:
    """Start launchers/train.py by `launcher` on both hosts; FOLDER/NAME.log is what each prints."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    try:
        for node, name in enumerate(NAMES):
            command = [*launcher(folder, port, node), "launchers/train.py", *arguments]
            if separate():
                command = [*_UNSHARE, "sh", "-c", _AS_HOST, "sh", name, *command]
            with (folder / f"{name}.log").open("w") as log:
                processes.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "lo"}, stdout=log,
                        stderr=subprocess.STDOUT, start_new_session=True,
                    )
                )  # fmt: skip
        yield processes
    finally:
        for process in processes:
            end(process)


def end(host: subprocess.Popen) -> None:
    """As if its machine lost power, but that its connections are closed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(host.pid, signal.SIGKILL)
    host.wait()
