"""`python -m megacode.tools.bench.checkpoint`: saving and loading, beside dd on the same disk; on the CPU or GPUs."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from megacode.errors import UserError
from megacode.recipe import Recipe
from megacode.tools.bench.contest import contest_recipe, layout_words
from megacode.tools.bench.ours import mesh_of, start_engine
from megacode.tools.bench.processes import Team, command_line
from megacode.tools.output import JsonFile, json_output

LAYOUTS: list[dict[str, Any]] = [{"zero": 1}, {"zero": 3}, {"pipeline": 2, "tensor": 2, "zero": 1}]
"""The last on four processes and more."""
MODEL = {"preset": "nano", "layers": 8, "heads": 12, "kv_heads": 12, "vocabulary": 32016}
SECONDS = ("copy", "own_calls", "write", "finish", "save", "blocked", "dd_write", "load", "dd_read")
ANSWER_SECONDS = 600.0
STEP_SECONDS = 0.05
"""Of a step that leaves the cores to the writers, as one on a GPU nearly does: it sleeps."""


@dataclass(frozen=True)
class Row:
    """A layout; seconds are those of the slowest rank, the best of several times."""

    layout: str
    num_bytes: int
    """Of a checkpoint."""
    share_bytes: int
    """Of it on the rank that keeps most: host memory that stays."""
    copy_seconds: float
    """To host memory: what a step waits for."""
    own_calls_seconds: float
    """The same with DeepSpeed's calls, which bring every tensor to every data rank."""
    write_seconds: float
    """Writing, hashing and syncing."""
    finish_seconds: float
    save_seconds: float
    """A save that is waited for, from beginning to end."""
    blocked_seconds: float
    """What steps wait for one that is not."""
    dd_write_seconds: float
    """As many dd at once, of as many bytes each as the largest share."""
    load_seconds: float
    """Verifying and reading, from the disk."""
    dd_read_seconds: float
    extra_bytes: int
    """While copying beyond those before, share left out: live tensors, or what torch has allocated of a GPU."""
    largest_bytes: int
    """Of the largest parameter on a rank, fp32."""


def case(folder: Path, processes: int, parallel: dict[str, Any], hidden: int, device: str) -> Recipe:
    """The recipe of a layout, bf16 on a GPU, with a file that stands for the tokenizer."""
    (folder / "tokenizer.model").write_bytes(b"none")
    (folder / "recipe.yaml").touch()
    data = processes // (parallel.get("tensor", 1) * parallel.get("pipeline", 1))
    values = contest_recipe("nano", 1, parallel, data).model_dump()
    model = {**MODEL, "hidden": hidden, "ffn": 8 * hidden // 3 // 64 * 64}
    values |= {"model": model, "tokenizer": {"path": str(folder / "tokenizer.model")}, "run": str(folder)}
    return Recipe.model_validate({**values, "precision": "bf16" if device == "cuda" else "fp32"})


def serve(recipe: Recipe, device: str) -> Callable[[str, int], dict[str, float]]:
    """What a rank answers: `save`, `blocked`, `load` of a step, `own_calls` and `live`: figures of it. Collective."""
    import torch.distributed as dist

    rank = _Rank(recipe, device)

    def answer(request: str, step: int) -> dict[str, float]:
        dist.barrier()
        figures: dict[str, float] = getattr(rank, request)(step)
        return figures

    return answer


class _Rank:
    """A rank with an engine whose moments are not zero."""

    def __init__(self, recipe: Recipe, device: str) -> None:
        from megacode.checkpoint import store
        from megacode.checkpoint.reader import STATES
        from megacode.model.layers import part_of
        from megacode.train.saver import Saver
        from megacode.train.start import writer

        self.recipe, self.run, self.mesh, self.device = recipe, Path(recipe.run), mesh_of(recipe), device
        self.zero, self.ranks = start_engine(recipe, self.mesh, device), writer(self.mesh)
        for name in self.zero.parameters:
            for key in STATES:
                self.zero.write(name, self.zero.read(name), key)
        parts = {name: part_of(parameter) for name, parameter in self.zero.parameters.items()}
        self.saver = Saver(recipe, parts, self.zero, self.ranks, None, lambda: None, device == "cuda")
        self.share = store.Share(parts, self.zero, self.ranks, device == "cuda")

    def progress(self, step: int) -> Any:
        from megacode.checkpoint.reader import Progress

        return Progress(step, 0, step, self.recipe.seed, self.recipe.batch.sequence_length, 0)

    def save(self, step: int) -> dict[str, float]:
        import torch.distributed as dist

        from megacode.checkpoint import store

        clock, folder = [time.monotonic()], store.step_folder(self.run, step)
        store.begin(folder, self.ranks)
        self.share.copy()
        clock.append(time.monotonic())
        report = self.share.write(folder)
        clock.append(time.monotonic())
        dist.barrier()
        clock.append(time.monotonic())
        store.finish(folder, self.recipe, self.progress(step), report, self.ranks)
        clock.append(time.monotonic())
        return {
            "copy": clock[1] - clock[0], "write": clock[2] - clock[1], "finish": clock[4] - clock[3],
            "save": clock[4] - clock[0],
        }  # fmt: skip

    def blocked(self, step: int) -> dict[str, float]:
        import torch.distributed as dist

        begun = time.monotonic()
        self.saver.save(self.progress(step))
        waited = time.monotonic() - begun
        while self.saver.busy:
            time.sleep(STEP_SECONDS)
            noted = self.saver.noted()
            noted = noted.to(self.device)
            dist.all_reduce(noted)
            totals = noted.tolist()
            begun = time.monotonic()
            self.saver.agree(totals, step)
            waited += time.monotonic() - begun
        return {"blocked": waited}

    def load(self, step: int) -> dict[str, float]:
        import torch.distributed as dist

        from megacode.checkpoint.reader import CheckpointReader
        from megacode.checkpoint.store import step_folder
        from megacode.train.start import resume

        folder = step_folder(self.run, step)
        if self.mesh.rank == 0:
            _forget(folder)
        dist.barrier()
        begun = time.monotonic()
        resume(self.zero, CheckpointReader(folder), self.mesh)
        return {"load": time.monotonic() - begun}

    def own_calls(self, step: int) -> dict[str, float]:
        from megacode.checkpoint.store import KEYS

        begun = time.monotonic()
        for name in self.zero.parameters:
            for key in KEYS:
                self.zero.read(name, key).clone()
        return {"own_calls": time.monotonic() - begun}

    def live(self, step: int) -> dict[str, float]:
        from megacode.engine.zero import local_shape

        extra = self._extra_on_gpu() if self.device == "cuda" else self._extra_on_cpu()
        largest = max(4 * local_shape(each).numel() for each in self.zero.parameters.values())
        return {"extra": extra, "largest": largest, "share": self.share.num_bytes}

    def _extra_on_gpu(self) -> int:
        import torch

        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.share.copy()
        return torch.cuda.max_memory_allocated() - before

    def _extra_on_cpu(self) -> int:
        from megacode.parallel.live import LiveBytes

        with LiveBytes() as counted:
            self.share.copy()  # sees what is there anyway
            counted.peak = before = counted.count()
            self.share.copy()
        return counted.peak - before


def _forget(folder: Path) -> None:
    """Have the kernel keep nothing of the files in memory."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def dd(folder: Path, processes: int, num_bytes: int) -> tuple[float, float]:
    """Seconds in which so many dd at once write so many bytes each and have them on the disk, and read them past the
    kernel's memory."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as source:
        block = os.urandom(2**20)  # zeros might not reach the disk
        while source.tell() < num_bytes:
            source.write(block)
        source.flush()
        files = [folder / f"dd_{number}" for number in range(processes)]
        write = _together([["dd", f"if={source.name}", f"of={file}", "bs=8M", "conv=fsync"] for file in files])
    read = _together([["dd", f"if={file}", "of=/dev/null", "bs=8M", "iflag=direct"] for file in files])
    for file in files:
        file.unlink()
    return write, read


def _together(commands: list[list[str]]) -> float:
    begun = time.monotonic()
    running = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for command in commands]
    if any(process.wait() for process in running):
        raise RuntimeError("dd failed")
    return time.monotonic() - begun


def measure(
    folder: Path, processes: int, layouts: list[dict[str, Any]], hidden: int, times: int, device: str
) -> Iterator[Row]:
    """Every layout, in a folder of the disk."""
    for parallel in layouts:
        with tempfile.TemporaryDirectory(prefix="megacode-checkpoint-", dir=folder) as name:
            run = Path(name)
            recipe = case(run, processes, parallel, hidden, device)
            team = Team(serve, (recipe, device), processes, 1, ANSWER_SECONDS, device)
            best: dict[str, float] = {}
            for number in range(times + 1):  # the first touches the memory
                found: dict[str, float] = {}
                for request in ("own_calls", "live", "save", "load", "blocked"):
                    step = 2 * number + 1 + (request == "blocked")
                    answers = team.ask(request, step)
                    found |= {key: max(each[key] for each in answers) for key in answers[0]}
                    shutil.rmtree(run / f"checkpoints/step_{step - 1:08d}", ignore_errors=True)
                files = list((run / "checkpoints").glob("step_*/*"))
                found["bytes"] = sum(file.stat().st_size for file in files)
                shutil.rmtree(run / "checkpoints")
                found["dd_write"], found["dd_read"] = dd(run, processes, int(found["share"]))
                best = found if number <= 1 else {key: min(best[key], found[key]) for key in best}
            team.stop()
        seconds: dict[str, Any] = {f"{key}_seconds": best[key] for key in SECONDS}
        sizes: dict[str, Any] = {f"{key}_bytes": int(best[key]) for key in ("share", "extra", "largest")}
        yield Row(f"{processes} x {layout_words(parallel)}", int(best["bytes"]), **sizes, **seconds)


def table(rows: list[Row]) -> str:
    """As Markdown; MB/s are of one rank."""
    lines = [
        "| layout | MB, largest share | copy (DeepSpeed's calls) | write | finish | save | blocked | of save "
        "| save, dd MB/s | load, dd MB/s | live bytes beyond, largest parameter |",
        "| --- " * 11 + "|",
    ]
    for row in rows:
        mega = row.share_bytes / 1e6
        cells = [
            row.layout,
            f"{row.num_bytes / 1e6:,.0f}, {mega:,.0f}",
            f"{row.copy_seconds:.2f} ({row.own_calls_seconds:.2f})",
            *(f"{seconds:.2f}" for seconds in (row.write_seconds, row.finish_seconds, row.save_seconds)),
            f"{row.blocked_seconds:.2f}",
            f"{row.blocked_seconds / row.save_seconds:.1%}",
            f"{mega / row.save_seconds:,.0f}, {mega / row.dd_write_seconds:,.0f}",
            f"{mega / row.load_seconds:,.0f}, {mega / row.dd_read_seconds:,.0f}",
            f"{row.extra_bytes / 1e6:,.1f}, {row.largest_bytes / 1e6:,.1f} MB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    folder: Annotated[Path, typer.Option(help="A folder of the disk to be measured.")] = Path(),
    processes: Annotated[int, typer.Option(min=1, help="Of each layout; from 4 on a multiple of 4.")] = 4,
    hidden: Annotated[int, typer.Option(help="Width of the model; 768 makes 106 million parameters.")] = 768,
    times: Annotated[int, typer.Option(min=1, help="The best of so many.")] = 3,
    device: Annotated[str, typer.Option(help="cpu, or cuda: a GPU for each process.")] = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Save, with steps waiting and without, and load, in several layouts; print seconds, MB/s and dd's.

    Example: python -m megacode.tools.bench.checkpoint --folder /scratch
    """
    layouts = LAYOUTS if processes >= 4 else LAYOUTS[:-1]
    if (processes >= 4 and processes % 4) or device not in ("cpu", "cuda"):
        raise UserError("--processes is less than 4 or a multiple of it, --device cpu or cuda")
    with json_output(json_file) as write_json:
        rows = []
        for row in measure(folder, processes, layouts, hidden, times, device):
            rows.append(row)
            write_json([asdict(row) for row in rows], whole=len(rows) == len(layouts))
        print(table(rows))


if __name__ == "__main__":
    command_line(main)
