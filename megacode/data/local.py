"""datatrove's executor on this machine, with a pool that notices when a process is killed."""

import contextlib
import io
import multiprocessing
import signal
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from megacode.errors import UserError

AGAIN = "mend it and start the same command again: what is done stays"


class LocalExecutor(LocalPipelineExecutor):
    """Runs what is not done of `tasks` tasks in so many processes; their logs go to `folder` only.

    datatrove's own pool waits for ever when one of its processes is killed, as it is where memory runs out.
    """

    def __init__(self, name: str, steps: list[PipelineStep], tasks: int, workers: int, folder: Path) -> None:
        super().__init__(steps, tasks=tasks, workers=workers, logging_dir=str(folder))
        self.name, self.folder = name, folder

    def run(self) -> None:
        """Raises: UserError where an input is not as it should be, or a task failed: which one, and its log."""
        ranks = self.get_incomplete_ranks()
        if self.workers == 1:
            for rank in ranks:
                self.task(rank)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.workers, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            try:
                done, _ = wait([pool.submit(self.task, rank) for rank in ranks], return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BrokenProcessPool:
                raise UserError(f"a process of the stage {self.name} was killed (no memory left?); {AGAIN}") from None
            finally:
                pool.shutdown(cancel_futures=True)

    def task(self, rank: int) -> None:
        """Run one task."""
        with contextlib.redirect_stderr(io.StringIO()):  # datatrove logs there too
            try:
                self._run_for_rank(rank, local_rank=rank)
            except UserError:
                raise
            except Exception as error:
                log = self.folder / "logs" / f"task_{rank:05d}.log"
                kind = type(error).__name__
                raise UserError(
                    f"task {rank} of the stage {self.name} failed ({kind}: {error}), see {log}; {AGAIN}"
                ) from error
