"""The console of a run: a live line in a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn


class Console:
    """Shows each step: in a terminal one live line with a bar, elsewhere a plain line a step.

    Args:
        step: the step that the run goes on from.
        num_steps: steps of the whole run.
        console: where to; left out, stdout.
    """

    def __init__(self, step: int, num_steps: int, console: rich.console.Console | None = None) -> None:
        self.first_step, self.num_steps, self.started = step, num_steps, time.monotonic()
        self.console = console or rich.console.Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def show(self, kind: str, values: dict[str, Any]) -> None:
        """A line of metrics (a step's or a validation's), or an event's text."""
        if kind == "events":
            self._print(values["text"])
        elif "validation_loss" in values:
            loss = _number(values["validation_loss"], ".4f") if values["validation_tokens"] else "of no token"
            self._print(f"{self._head(values)}  validation loss {loss}")
        elif self.console.is_terminal:
            self._draw(values)
        else:
            self._print("  ".join((self._head(values), *self._figures(values))))

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _print(self, text: str) -> None:
        if self.console.is_terminal:
            self.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.console.file, flush=True)

    def _draw(self, values: dict[str, Any]) -> None:
        if self._progress is None:
            self._progress = Progress(
                BarColumn(bar_width=10), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
                console=self.console, auto_refresh=False,
            )  # fmt: skip
            self._task = self._progress.add_task("", total=self.num_steps, figures="")
            self._progress.start()
        self._progress.update(self._task, completed=values["step"], figures="\n".join(self._figures(values)))
        self._progress.refresh()

    def _head(self, values: dict[str, Any]) -> str:
        return f"step {values['step']:>{len(str(self.num_steps))}}/{self.num_steps}"

    def _figures(self, values: dict[str, Any]) -> tuple[str, str]:
        """Two lines that fit 80 columns beside the bar."""
        done = values["step"] - self.first_step
        left_seconds = (time.monotonic() - self.started) / done * (self.num_steps - values["step"])
        mfu = "" if values["mfu"] is None else f"MFU {values['mfu']:.1%}  "
        infilled = ""
        if values["loss_infilled"] is not None:
            infilled = f"  infilled {_number(values['loss_infilled'], '.4f')} ({values['infilled_share']:.1%})"
        skipped = "  update left out" if values["skipped"] else ""
        return (
            f"loss {_number(values['loss'], '.4f')}{infilled}  norm {_number(values['grad_norm'], '.3f')}{skipped}",
            f"lr {values['learning_rate']:.2e}  {values['tokens_per_second']:,.0f} tokens/s  {mfu}"
            f"{values['memory_bytes'] / 2**30:.2f} GiB  {_clock(left_seconds)} left",
        )


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
