"""Runs as jobs of a cluster on this machine: `megacode submit`, and what becomes of them."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from support.launching import ROOT, write_recipe
from support.slurm import SlurmCluster

WAIT_SECONDS = 480  # the machine may be busy


def write_small_recipe(folder: Path, steps: int) -> Path:
    """A nano recipe that saves and validates at its end only."""
    path = write_recipe(folder)
    values = yaml.safe_load(path.read_text())
    del values["deepspeed_config"]
    values["parallel"] = {}
    values["schedule"]["steps"] = steps
    values["batch"] = {"global_samples": 16, "micro_samples": 2, "sequence_length": 64}
    values["checkpoint"]["every_steps"] = values["logging"]["validate_every_steps"] = 10**6
    path.write_text(yaml.safe_dump(values))
    return path


class Submitter:
    """Sends runs of one process a node on CPUs, and looks at their jobs."""

    def __init__(self, cluster: SlurmCluster, recipe: Path) -> None:
        self.cluster, self.recipe = cluster, recipe

    def __call__(self, run: Path, *arguments: str, nodes: int = 2) -> "Job":
        """Submit; the arguments are options and overrides."""
        return Job(self.cluster, run, self.output(run, *arguments, nodes=nodes))

    def output(self, run: Path, *arguments: str, nodes: int = 2) -> str:
        """What the command prints."""
        done = self.start(run, *arguments, nodes=nodes)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, run: Path, *arguments: str, nodes: int = 2) -> subprocess.CompletedProcess:
        """The command as it ends, well or not."""
        command = [sys.executable, "-c", "from megacode.cli import main; main()", "submit", str(self.recipe)]
        places = [] if "--gpus-per-node" in arguments else ["--gpus-per-node", "0", "--tasks-per-node", "1"]
        options = ["--nodes", str(nodes), *places, f"run={run}"]
        environment = {
            **os.environ, **self.cluster.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "", "MASTER_PORT": str(random.randint(30000, 60000)),
        }  # fmt: skip
        return subprocess.run(
            [*command, *options, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )


class Job:
    """A job in the queue, or one that was."""

    def __init__(self, cluster: SlurmCluster, run: Path, output: str) -> None:
        self.cluster, self.run, self.output = cluster, run, output
        (line,) = (line for line in output.splitlines() if line.startswith("job "))
        self.number = line.split()[1].rstrip(":")

    def state(self) -> str:
        """As squeue says it; empty where it gets no answer, on a busy machine."""
        command = ("squeue", "--noheader", "--states=all", f"--jobs={self.number}", "--format=%T")
        return self.cluster.run(*command, check=False).strip()

    def log(self) -> str:
        """What the batch script has printed, in all starts."""
        file = self.run / "slurm" / f"job_{self.number}.txt"
        return file.read_text() if file.exists() else ""

    def starts(self, event: str) -> list[dict]:
        """The lines of RUN/slurm/starts.jsonl that tell of its beginnings, or of its ends."""
        lines = _lines(self.run / "slurm" / "starts.jsonl")
        return [line for line in lines if (line["job"], line["event"]) == (self.number, event)]

    def step(self) -> int:
        """The last step that metrics.jsonl tells of."""
        return max((line["step"] for line in _lines(self.run / "metrics.jsonl")), default=0)

    def wait(self, what: Callable[[], bool]) -> None:
        """Wait until something is so, which it never is if the job ends otherwise."""
        stop = time.monotonic() + WAIT_SECONDS
        while not what():
            over = self.over()
            assert what() or (not over and time.monotonic() < stop), self.everything()
            time.sleep(0.05)

    def over(self) -> bool:
        """Whether the job will not run any more."""
        return self.state() in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

    def wait_for_step(self, more: int) -> None:
        """Wait until this start, which may have yet to begin, has done some steps."""
        begun = self.run / "starts.jsonl"
        self.wait(lambda: bool(self.starts("begin")))
        job_began = self.starts("begin")[-1]["unix_time"]
        self.wait(lambda: any(line["unix_time"] > job_began for line in _lines(begun)))
        first = _lines(begun)[-1]["step"]
        self.wait(lambda: self.step() >= first + more)

    def wait_for_start(self, number: int) -> None:
        """Wait until the job has been started again so often."""
        self.wait(lambda: len(self.starts("begin")) > number)

    def wait_for_end(self) -> str:
        """Wait until it has left; returns the state it left in."""
        self.wait(self.over)
        facts = self.cluster.run("scontrol", "show", "job", self.number)
        return facts.split("JobState=")[1].split()[0]

    def signal_batch(self) -> None:
        """What SLURM does before the time limit."""
        self.cluster.run("scancel", "--batch", "--signal=USR1", self.number)

    def process(self, rank: int) -> int:
        """The process of a rank that runs, started by srun."""
        wanted = {f"SLURM_CONF={self.cluster.environment['SLURM_CONF']}", f"SLURM_JOB_ID={self.number}"}
        wanted.add(f"SLURM_PROCID={rank}")
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if "megacode.train" not in (folder / "cmdline").read_text():
                    continue
                if wanted <= set((folder / "environ").read_text().split("\0")):
                    return int(folder.name)
        raise AssertionError(f"rank {rank} does not run\n{self.everything()}")

    def everything(self) -> str:
        """All logs, for a test that failed."""
        logs = sorted(self.run.rglob("*.txt"))
        texts = [f"== {log}\n{log.read_text(errors='replace')[-2000:]}" for log in logs]
        return "\n".join([self.cluster.run("squeue"), *texts, self.cluster.log("slurmctld")])


def _lines(file: Path) -> list[dict]:
    """The whole lines of a file of JSON lines that may be growing, or not there yet."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]


@contextmanager
def ending(job: Job) -> Iterator[Job]:
    """Cancels a job that a failing test leaves behind."""
    try:
        yield job
    finally:
        job.cluster.run("scancel", job.number, check=False)
        job.wait(job.over)
