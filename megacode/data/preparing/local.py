"""datatrove's executor on this machine, with a pool that notices when a process is killed."""

import contextlib
import io
import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from megacode.errors import UserError

AGAIN = "mend it and start the same command again: what is done stays"


@contextlib.contextmanager
def pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes for `LocalExecutor`, started when there are tasks for them; none for one worker."""
    if workers == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    # Ctrl-C is for this process; the others end what they are at and go.
    with ProcessPoolExecutor(workers, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as processes:
        try:
            yield processes
        finally:
            processes.shutdown(cancel_futures=True)


class LocalExecutor(LocalPipelineExecutor):
    """Runs what is not done of `tasks` tasks; their logs go to `folder` only.

    datatrove's own pool waits for ever when one of its processes is killed, as it is where memory runs out.
    """

    def __init__(self, name: str, steps: list[PipelineStep], tasks: int, folder: Path) -> None:
        super().__init__(steps, tasks=tasks, logging_dir=str(folder))
        self.name, self.folder = name, folder

    def run_in(self, processes: ProcessPoolExecutor | None) -> None:
        """Run in a `pool`. Raises: UserError where an input is not as it should be, or a task failed: which, why."""
        ranks = self.get_incomplete_ranks()
        if processes is None or self.tasks == 1:
            for rank in ranks:
                self.task(rank)
            return
        try:
            done, _ = wait([processes.submit(self.task, rank) for rank in ranks], return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BrokenProcessPool:
            raise UserError(f"a process of the stage {self.name} was killed (no memory left?); {AGAIN}") from None

    def task(self, rank: int) -> None:
        """Run one task."""
        with contextlib.redirect_stderr(io.StringIO()):  # datatrove logs there too
            try:
                self._run_for_rank(rank, local_rank=rank)
            except UserError:
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                log = self.folder / "logs" / f"task_{rank:05d}.log"
                what = f"task {rank} of the stage {self.name} failed ({reason}); its log is {log}"
                raise UserError(f"{what}; {AGAIN}") from error
