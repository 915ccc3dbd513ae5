"""Ends a run that stands still, with a word on who is to blame and the stacks of all ranks.

Each rank has a thread that counts its heartbeat, and looks whether a verdict was given. The thread of the lowest rank
that runs, rank 0 as a rule, gives it.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from megacode.errors import UserError
from megacode.parallel import heartbeat
from megacode.parallel.heartbeat import Record
from megacode.parallel.mesh import SLOWEST_WRITER
from megacode.plan.layout import Layout
from megacode.train.faults import Peer, process_state
from megacode.train.sight import SHARED, SLACK_SECONDS, Ages, Machine, Others, Sight, shared_folder
from megacode.train.stacks import Stacks
from megacode.train.verdict import Process, Seen, Verdict, judge

EXIT_STALLED = 76
"""Exit code of a run in which no rank went on."""

LONGEST_PERIOD_SECONDS = 5.0
GRACE_SECONDS = 10.0
"""How long a rank waits for the stacks of the others before it ends."""
END_SECONDS = 5.0
"""How long ranks that were stopped or held have to end by themselves."""


class StallWatch:
    """Keeps this rank's heartbeat and watches over all.

    Args:
        run: the run folder; it need not exist yet.
        me: this rank.
        layout: of the run.
        stall_seconds: how long all ranks must stand still.
        claim: called on the one rank that gives a verdict: the exit code of all ranks, EXIT_STALLED if it counts; it
            does not where the run has ended or failed otherwise.
        tell: says a verdict that counts to the user.
        looked: called at each look of the rank that would give a verdict.

    Raises:
        UserError: there is no shared memory for the heartbeat.
    """

    def __init__(
        self, run: Path, me: Peer, layout: Layout, stall_seconds: float,
        claim: Callable[[Verdict], int], tell: Callable[[Verdict], None],
        looked: Callable[[Mapping[int, Seen]], None], root: Path = SHARED,
    ) -> None:  # fmt: skip
        self.run, self.me, self.layout, self.stall_seconds = run, me, layout, stall_seconds
        self.period_seconds = min(LONGEST_PERIOD_SECONDS, stall_seconds / 8)
        try:
            folder = shared_folder(run, root)
            path = folder / f"rank_{me.rank:05d}"
            self.heart = heartbeat.begin(path, me.rank, me.pid, me.started or 0, me.host)
            self.stacks = Stacks(run, folder, me)
        except OSError as error:
            raise UserError(
                f"{root}: the ranks' heartbeats can't be kept there ({error.strerror}); make room, or mend its mode"
            ) from None
        self.machine, self.others = Machine(folder, self.period_seconds), Others(run, self.period_seconds)
        self._still, self._looks_next = Ages(), 0.0
        self._claim, self._tell, self._looked = claim, tell, looked
        self._over, self._leaving = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="stall watch", daemon=True)

    def start(self) -> None:
        """Watch until `stop`."""
        self._thread.start()

    def stop(self) -> None:
        """The run is over: nobody need go on. Ends this process if there is a verdict."""
        self.leave_if_told()  # a rank that was woken for its stacks may have come to the end meanwhile
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(timeout=LONGEST_PERIOD_SECONDS)
        self.stacks.close()
        self.clear()

    def clear(self) -> None:
        """Take this rank's files out of shared memory: the process ends."""
        heartbeat.end()
        self.stacks.clear()
        with suppress(OSError):  # others are still there
            self.machine.folder.rmdir()

    def leave_if_told(self, wait_seconds: float = 0.0) -> None:
        """End this process if there is a verdict on this start, or will be within some seconds."""
        deadline = time.monotonic() + wait_seconds
        while True:
            with self._leaving:  # a thread that leaves never gives it back
                if (told := self._told()) is not None:
                    self._leave(*told)
            if time.monotonic() >= deadline:
                return
            time.sleep(0.1)

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._over.wait(self.period_seconds):
            pause, looked = time.monotonic() - looked, time.monotonic()
            self.heart.beat()
            with suppress(OSError):  # the run folder's disk may come back
                self.leave_if_told()
                if pause > 3 * self.period_seconds + SLACK_SECONDS:  # this process was stopped, the others perhaps too
                    self._still.forget()
                    self.stacks.forget()
                self._look()

    def _look(self) -> None:
        machine = self.machine.look()
        if not self._leads(machine) or not self.run.is_dir():
            self._still.forget()
            return
        with suppress(OSError):  # a full disk, say: that the others see nothing of this machine is told by its age
            self.others.publish(self.me.rank, machine)
            self._verdict_file.touch()
        if 0 not in machine and time.monotonic() < self._looks_next:
            return  # each of many machines reads the files of all: seldom, where another gives the verdict as a rule
        self._looks_next = time.monotonic() + self.stall_seconds / 4
        seen = self._seen({**self.others.look(), **machine})
        if self.me.rank != min(rank for rank, each in seen.items() if each.process == "runs"):
            return
        self._looked(seen)
        if all(each.still_seconds >= self._patience_seconds(each) for each in seen.values()):
            with self._leaving:
                self._judge(seen)

    def _leads(self, machine: Sight) -> bool:
        """Whether this is the machine's lowest rank that runs."""
        return self.me.rank == min((rank for rank, (_, process) in machine.items() if process == "runs"), default=-1)

    def _seen(self, sight: Sight) -> dict[int, Seen]:
        missing: tuple[None, Process] = (None, "missing")
        seen = {}
        for rank in range(self.layout.world_size):
            record, process = sight.get(rank, missing)
            changes = record and (record.pid, record.started, record.changes)
            seen[rank] = Seen(record, process, self._still.seconds(rank, changes))
        return seen

    def _patience_seconds(self, seen: Seen) -> float:
        """How long a rank may stand still; one that is busy with files, long."""
        working = seen.process in ("runs", "held")
        if working and seen.record is not None and seen.record.patient and not seen.record.kind:
            return max(self.stall_seconds, SLOWEST_WRITER.total_seconds())
        return self.stall_seconds

    @property
    def _verdict_file(self) -> Path:
        return self.others.folder / "verdict.json"

    def _judge(self, seen: Mapping[int, Seen]) -> None:
        verdict = judge(seen, self.layout)
        code = self._claim(verdict)
        self.heart.halted = True
        records = [each.record for each in seen.values() if each.record is not None and each.process != "ended"]
        processes = [[record.rank, record.host, record.pid, record.started] for record in records]
        told = {"verdict": verdict.conclusion, "code": code, "unix_time": time.time(), "processes": processes}
        with suppress(OSError):
            self._verdict_file.write_text(json.dumps(told), encoding="utf-8")
        if code == EXIT_STALLED:
            with suppress(OSError):
                self.stacks.write()  # the others wait for it, and telling may take long
            self._tell(verdict)
        self._leave(code, processes)

    def _told(self) -> tuple[int, list[list]] | None:
        """Exit code and processes of a verdict, if it is on this one."""
        try:
            told = json.loads(self._verdict_file.read_text(encoding="utf-8"))
            code, processes = int(told["code"]), told["processes"]
        except (OSError, ValueError, KeyError):
            return None
        return (code, processes) if [self.me.rank, self.me.host, self.me.pid, self.me.started] in processes else None

    def _leave(self, code: int, processes: list[list]) -> NoReturn:
        """End, with those of this machine that can't by themselves; of a stall, once the stacks of all are written."""
        self.heart.halted = True  # a rank that is woken for its stacks would let all go on
        try:
            machine = self.machine.look()
            asleep = [record for record, process in machine.values() if process in ("stopped", "held")]
            mine = asleep if self._leads(machine) else []
            if code == EXIT_STALLED:
                self.stacks.write()
                self.stacks.wait([(rank, pid, start) for rank, _, pid, start in processes], mine, GRACE_SECONDS)
            _end(mine)
            self.clear()
        finally:
            os._exit(code)


def _end(records: Iterable[Record]) -> None:
    """Kill processes that do not end by themselves."""
    began, left = time.monotonic(), list(records)
    while left and time.monotonic() < began + END_SECONDS:
        time.sleep(0.1)
        left = [record for record in left if process_state(record.pid, record.started) is not None]
    for record in left:
        with suppress(OSError):
            os.kill(record.pid, signal.SIGKILL)
