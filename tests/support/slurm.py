"""A real SLURM cluster on this machine, in a folder of its own, for the length of a test session.

Debian's slurmctld, slurmd, slurm-client and munge are enough: no systemd, no cgroups, nothing in /etc. All nodes are
this machine, so limits of memory and cores are not enforced; GPUs are null devices, which only root can make.

Known of SLURM 22.05: `--signal` is looked after every 30 s only, so send signals by `scancel --signal` where time
counts; a requeued job waits 5 s, unless `scontrol update JobId=J StartTime=now`; a node is lost at once by
`scontrol update NodeName=n2 State=down Reason=x`; names of nodes (n1, n2, ...) do not resolve.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
UP_SECONDS = 30.0
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

_CONFIGURATION = """\
ClusterName=megacode
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobs.txt
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=300
SlurmdTimeout=300
InactiveLimit=0
MinJobAge=3600
MailProg=/bin/true
KillWait=30
UnkillableStepTimeout=30
Waittime=0
MessageTimeout=30
JobRequeue=1
"""
_PARTITIONS = """\
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE DefaultTime=60 State=UP PriorityTier=1 GraceTime=60 PreemptMode=REQUEUE
"""


def unavailable(gpus: int = 0) -> str | None:
    """Why no cluster can be started here; None where one can."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]
    if absent:
        return f"{', '.join(absent)} not installed (packages slurmctld, slurmd, slurm-client and munge)"
    return "only root can make the devices of GPUs" if gpus and os.geteuid() else None


class SlurmCluster:
    """A cluster with the partitions `main` and `low` (which `main` preempts), started by `with`.

    Args:
        nodes: n1, n2, ...
        cpus: Cores of a node; there may be more than this machine has.
        gpus: GPUs of a node (CUDA_VISIBLE_DEVICES is set for jobs that ask for some; nothing can be computed on them).

    Attributes:
        folder: Configuration, logs (log/) and state.
        environment: Variables that SLURM's commands need to find this cluster.
    """

    def __init__(self, nodes: int = 2, cpus: int = 2, gpus: int = 0) -> None:
        self.nodes, self.cpus, self.gpus = nodes, cpus, gpus
        # Not pytest's own folder: the path of a Unix socket has 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> "SlurmCluster":
        try:
            self._configure()
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """Run a command (sbatch, squeue, ...) against this cluster. Returns: what it printed."""
        variables = {**os.environ, "PATH": _PATH, **self.environment, **environment}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def queued(self) -> list[str]:
        """The jobs that wait, run or end, by number; each task of an array that has started is one."""
        return self.run("squeue", "--noheader", "--format=%A").split()

    def wait(self, seconds: float = 120.0) -> None:
        """Wait until the queue is empty."""
        stop = time.monotonic() + seconds
        while self.queued():
            assert time.monotonic() < stop, f"jobs do not end:\n{self.run('squeue')}{self.log('slurmctld')}"
            time.sleep(0.2)

    def log(self, daemon: str) -> str:
        """The end of a daemon's log: slurmctld, slurmd-n1, ..."""
        return (self.folder / "log" / f"{daemon}.log").read_text(errors="replace")[-5000:]

    def _configure(self) -> None:
        for name in ("state", "log", "run", "spool", "munge", "dev"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        (self.folder / "munge").chmod(0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        host, ports = socket.gethostname().split(".")[0], _free_ports(self.nodes + 1)
        user = _name_of_user()
        lines = [_CONFIGURATION.format(host=host, port=ports[0], user=user, folder=self.folder)]
        resources = ""
        if self.gpus:
            resources = f"Gres=gpu:{self.gpus}"
            lines.append("GresTypes=gpu\n")
            devices = [self.folder / "dev" / f"nvidia{i}" for i in range(self.gpus)]
            for device in devices:
                subprocess.run(["mknod", str(device), "c", "1", "3"], check=True)
            rows = [f"NodeName=n[1-{self.nodes}] Name=gpu File={device}\n" for device in devices]
            (self.folder / "gres.conf").write_text("".join(rows))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 8 // 10 // self.nodes >> 20
        for i in range(1, self.nodes + 1):
            (self.folder / "spool" / f"n{i}").mkdir()
            shape = f"CPUs={self.cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={self.cpus} ThreadsPerCore=1"
            place = f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[i]}"
            lines.append(f"{place} {shape} RealMemory={memory} {resources} State=UNKNOWN\n")
        (self.folder / "slurm.conf").write_text("".join([*lines, _PARTITIONS]))

    def _start(self) -> None:
        munge = self.folder / "munge"
        self.run(
            *("munged", "--force", "--num-threads=2", f"--key-file={munge}/key", f"--socket={munge}/socket"),
            *(f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed"),
        )
        self._daemon("slurmctld")
        for i in range(1, self.nodes + 1):
            self._daemon("slurmd", "-N", f"n{i}")
        stop = time.monotonic() + UP_SECONDS
        while self.run("sinfo", "--noheader", "-N", "--format=%N %T", check=False).count(" idle") < 2 * self.nodes:
            assert time.monotonic() < stop, f"the cluster does not come up:\n{self.log('slurmctld')}"
            time.sleep(0.1)

    def _daemon(self, *command: str) -> None:
        # It goes on in the background and would hold a pipe of ours open.
        variables = {**os.environ, "PATH": _PATH, **self.environment}
        with (self.folder / "log" / f"{command[0]}.start").open("ab") as output:
            subprocess.run(command, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=True)

    def _stop(self) -> None:
        """Cancel all jobs and stop the daemons, each by its process id."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired, FileNotFoundError):
            self.run("scancel", f"--user={os.getuid()}")
            self.wait(10.0)
        files = [*(self.folder / "run").glob("*.pid"), self.folder / "munge" / "pid"]
        processes = [pid for pid in map(_process, files) if pid is not None]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            stop = time.monotonic() + 5.0
            while any(_runs(pid) for pid in processes) and time.monotonic() < stop:
                time.sleep(0.05)
        shutil.rmtree(self.folder, ignore_errors=True)


def _process(file: Path) -> int | None:
    """The process that a file names, if it is one of the daemons still."""
    try:
        pid = int(file.read_text())
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    except (OSError, ValueError):
        return None
    return pid if name in ("munged", "slurmctld", "slurmd") else None


def _runs(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def _name_of_user() -> str:
    import pwd

    return pwd.getpwuid(os.geteuid()).pw_name


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
