"""Where the time of a step goes: named phases, measured only while somebody asks.

`measure("forward")` stands wherever a phase begins and ends. Phases nest, and time counts for the innermost one: the
all-reduces inside a forward are communication, not forward. While nobody records, it does nothing.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise

import torch

PHASES = ("data", "forward", "backward", "communication", "optimizer", "logging")
"""What `measure` is called with; what lies between is "other"."""


class Recorder:
    """Collects the time between marks for the phase that was innermost.

    On a GPU the marks are events on the current stream, so communication is what the stream waited for, and reading
    them waits for the device once; on a CPU they are times.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._stack = ["other"]
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._mark()

    def restart(self) -> None:
        """Forget what was before: a step begins."""
        self._marks.clear()
        self._mark()

    def _mark(self) -> None:
        """From here on, time counts for the phase on top."""
        if not self.on_gpu:
            self._marks.append((self._stack[-1], time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((self._stack[-1], event))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time within counts for `name`; torch's profiler shows it too."""
        self._stack.append(name)
        self._mark()
        try:
            with torch.profiler.record_function(name):
                yield
        finally:
            self._stack.pop()
            self._mark()

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call. Waits for the device."""
        self._mark()
        marks, self._marks = self._marks, self._marks[-1:]
        last = marks[-1][1]
        if not isinstance(last, float):
            last.synchronize()
        seconds = dict.fromkeys((*PHASES, "other"), 0.0)
        for (name, begin), (_, end) in pairwise(marks):
            if isinstance(begin, float):
                assert isinstance(end, float)
                seconds[name] += end - begin
            else:
                assert not isinstance(end, float)
                seconds[name] += begin.elapsed_time(end) / 1000
        return seconds


_recorder: Recorder | None = None


def record(device: torch.device) -> Recorder:
    """Start recording in this process."""
    global _recorder
    _recorder = Recorder(device)
    return _recorder


def stop_recording() -> None:
    """Let `measure` do nothing again."""
    global _recorder
    _recorder = None


def measure(name: str) -> AbstractContextManager[None]:
    """Count the time within for the phase `name`, if somebody records."""
    return nullcontext() if _recorder is None else _recorder.phase(name)
