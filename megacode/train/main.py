"""From a recipe file to a finished run, on one rank: what launchers/train.py and `python -m megacode.train` call."""

import argparse
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from megacode import recipe
from megacode.checkpoint import keep
from megacode.checkpoint.origin import check_disk, open_tokenizer
from megacode.data.stream import ORDER, TrainStream, ValidationStream
from megacode.data.tokenizer import Tokenizer
from megacode.engine.zero import ZeroEngine, check_config, check_version, start_deepspeed
from megacode.errors import UserError, explain
from megacode.parallel.heartbeat import doing, waiting
from megacode.parallel.mesh import Mesh, build_mesh
from megacode.parallel.phases import record
from megacode.plan.layout import Layout, fit
from megacode.recipe import Recipe
from megacode.train import faults, interrupt, lock, metrics, start
from megacode.train.agreement import compare_parameters, compare_starts
from megacode.train.console import Console
from megacode.train.faults import Peer, PeerWatch, Requests
from megacode.train.interrupt import EXIT_STOPPED
from megacode.train.journal import Journal
from megacode.train.launch import Place, find_device, find_place, start_process_group
from megacode.train.loop import Trainer
from megacode.train.out_of_memory import explain_out_of_memory, is_out_of_memory
from megacode.train.profile import check_profile
from megacode.train.stall import EXIT_STALLED, StallWatch
from megacode.train.straggler import Stragglers
from megacode.train.trackers import check_trackers, open_trackers
from megacode.train.verdict import Seen, Verdict, spans

TELLING_SECONDS = 10.0
"""How long a verdict on a stall may take to be written once the run is known to have failed."""

WORD_SECONDS = 3.0
"""How long a rank waits for another to say why the run fails, who knows more of it."""


def main(arguments: list[str]) -> int:
    """Train; returns the process's exit code.

    0: finished; 1: failed; 2: the user can mend it (said once a machine); 75: asked to stop, and saved; 76: stalled. A
    signal before the first step ends the process with 75, or 130 (Ctrl-C), where `interrupt.begin` was called.
    """
    options = _parse(arguments)
    place, run = Place(0, 0, 1, 1), None
    try:
        place = find_place(options.local_rank)
        check_version()
        device = find_device(place)
        tokenizer, config = _load(options)
        layout = fit(config, place.world_size)
        with _writing(Path(config.run)):
            lock.hold(Path(config.run), place.rank)  # first of all: heartbeats of two starts would be mixed up
        run = Run(config, layout, place, device)
        doing("opening the data", patient=True)  # best-fit packing may have to count the samples of a corpus first
        check_config(config, device)
        check_trackers(config)
        check_profile(config, layout.world_size)
        streams = start.open_streams(config, tokenizer)
        start.check_run_folder(config, streams[0])
        check_disk(config)
        if place.rank == 0:
            with _writing(run.folder):
                run.begin()
    except UserError as error:
        if run is not None:
            run.stall.stop()
        return _refuse(error, speaks=place.local_rank == 0)
    return run.run(streams)


class Run:
    """A rank's run to its end, whatever that is. It keeps a heartbeat from here on.

    Raises:
        UserError: it can't.
    """

    def __init__(self, recipe: Recipe, layout: Layout, place: Place, device: torch.device) -> None:
        self.recipe, self.layout, self.place, self.device = recipe, layout, place, device
        self.folder = Path(recipe.run)
        self.journal: Journal | None = None
        self.watch: PeerWatch | None = None
        self.trainer: Trainer | None = None
        self.peers: list[Peer] = []
        self.start = "before the ranks know each other"
        self.begun = False
        """Whether status.json is this start's."""
        self._telling = threading.Lock()
        self.requests = Requests(self.folder, looks=place.rank == 0)
        self.stragglers = Stragglers(layout)
        self.stall = StallWatch(
            self.folder, faults.this_process(place.rank), layout, recipe.faults.stall_seconds,
            self._claim_stall, self._tell_stall, self._look_for_stragglers,
        )  # fmt: skip
        self.stall.start()
        interrupt.at_end(self._stop_before_first_step)

    def begin(self) -> None:
        """From here on the run folder says that this start runs. Rank 0 only.

        Raises:
            OSError: it can't be written.
        """
        newest, again = keep.newest(self.folder), os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        self.requests.clear_old(keep.step_of(newest) if newest else 0, lock.held_since_ns(self.folder), again)
        metrics.begin_status(self.folder)
        self.begun = True

    def run(self, streams: tuple[TrainStream, ValidationStream | None]) -> int:
        """The exit code. A failure ends the process at once."""
        timeout_seconds = self.recipe.faults.collective_timeout_seconds
        try:
            doing("starting the process group")
            with waiting("rendezvous", "world"):
                start_process_group(self.place, self.device, timeout_seconds)
            self.begun = True  # rank 0 has
            layout = self.layout
            train, valid = streams
            corpora = {f"data.train ({corpus.name})": corpus for corpus in train.corpora}
            compare_starts(self.recipe, layout, corpora | ({"data.valid": valid.corpus} if valid is not None else {}))
            with waiting("making of groups", "world"):
                mesh = build_mesh(layout.pipeline, layout.data, layout.tensor, layout.context, timeout_seconds)
            self._watch_peers(mesh)
            doing("starting DeepSpeed")
            start_deepspeed()
            self.trainer = trainer = self._trainer(mesh, *streams)
            self.requests.listen()
            stopped = trainer.run()
            assert self.watch is not None
            self.watch.stop()
            self.stall.leave_if_told()
            trainer.finish(stopped)
            with waiting("barrier", "world"):
                dist.barrier(group=mesh.control_group)
            doing("leaving the process group")
            dist.destroy_process_group()
            self.requests.rest()
            self.stall.stop()
        except (Exception, KeyboardInterrupt) as error:
            self._fail(error)
        return 0 if stopped is None else EXIT_STOPPED

    @property
    def step(self) -> int | None:
        """The last step that is done; None before the first can begin."""
        return self.trainer.progress.step if self.trainer is not None else None

    def _watch_peers(self, mesh: Mesh) -> None:
        peers: list[Any] = [None] * dist.get_world_size()
        with waiting("all-gather", "world"):
            dist.all_gather_object(peers, faults.this_process(mesh.rank), group=mesh.control_group)
        self.peers = peers
        self.start = f"{peers[0].host} {peers[0].pid} {peers[0].started}"
        self.watch = PeerWatch(peers, mesh.rank, self._is_in_vain, self._peers_are_gone)
        self.watch.start()

    def _is_in_vain(self) -> bool:
        """Whether the run is known to have failed, on another machine perhaps."""
        return metrics.has_failed(self.folder, self.start)

    def _trainer(self, mesh: Mesh, stream: TrainStream, validation: ValidationStream | None) -> Trainer:
        """A trainer at the newest checkpoint of the run folder, or at the beginning."""
        config, device = self.recipe, self.device
        engine = ZeroEngine(config, self.layout, mesh, device, num_groups=2 * len(stream.sources))
        compare_parameters(engine.parameters, mesh)
        # Rank 0 decides: on network file systems the ranks may see different newest folders.
        ranks = start.writer(mesh)
        newest = ranks.broadcast(keep.newest(self.folder))
        if mesh.rank == 0:
            doing("removing what a killed run left of checkpoints", patient=True)
            keep.sweep(self.folder)
        progress = start.load_weights(engine, config, mesh, newest, start.new_progress(config, stream))
        if mesh.rank == 0:
            step, hosts = progress.step, [peer.host for peer in self.peers]
            facts = metrics.start_facts(config, self.layout, device, hosts, step, newest, engine.backends)
            sources = describe_sources(config, stream)
            facts["data"] = {"packing": config.data.packing, "order": ORDER, "sources": sources}
            self._announce(step, newest, facts, engine.reasons)
        recorder = record(device) if config.logging.phases else None
        return Trainer(
            config, self.layout, mesh, device, engine, stream, validation, progress, self.requests, self.journal,
            recorder,
        )  # fmt: skip

    def _announce(self, step: int, newest: Path | None, facts: dict[str, Any], reasons: Mapping[str, str]) -> None:
        """Rank 0 opens the run's files and says what starts."""
        doing("opening the run's files")
        steps = self.recipe.schedule.steps
        fresh = f"starting at step {step} from {start.describe_weights(self.recipe)}" if newest is None else ""
        print(fresh or f"resuming from {newest} at step {step}", flush=True)
        for operation, reason in reasons.items():
            print(f"{operation} by {facts['backends'][operation]} ({reason})", flush=True)
        for name, source in facts["data"]["sources"].items():
            share, tokens, epochs = source["weight"], source["num_tokens"], source["epochs"]
            print(f"source {name}: {share:.4%} of the samples, {tokens:,} tokens, {epochs:.4g} epochs", flush=True)
        if step >= steps:
            print(f"nothing to do: step {step} is done and schedule.steps is {steps}; raise it to go on", flush=True)
        else:
            self.recipe.save(self.folder / "recipe.yaml")
        metrics.write_status(self.folder, "running", step=step, checkpoint=newest and str(newest))
        metrics.append_start(self.folder, facts)
        trackers = open_trackers(self.recipe, step, facts)
        self.journal = Journal(self.folder, step, Console(step, steps), trackers)

    def _peers_are_gone(self, gone: list[Peer], tells: bool) -> None:
        """Called in a thread: other ranks of this machine have ended, and this one must not wait for them."""
        interrupt.settle(self._has_stopped)
        try:
            self.stall.leave_if_told(wait_seconds=0 if gone else TELLING_SECONDS)
            if tells:
                self._tell(f"{_names(gone)} ended" if gone else "another rank failed", None, gone=gone)
            else:  # else it may look as if this rank had been the first to go
                self._wait_for_word()
        finally:
            self.stall.clear()
            os._exit(1)

    def _fail(self, error: BaseException) -> NoReturn:
        """End at once and loudly: the others sit in collectives that this rank will never enter.

        Interpreter shutdown could wait for those collectives.
        """
        interrupt.settle(lambda: faults.lost_connection(error) is not None and self._has_stopped())
        try:
            self.stall.leave_if_told()
            if self.watch is not None:
                self.watch.stop()
            if isinstance(error, OSError) and Path(str(error.filename)).is_relative_to(self.folder):
                error = UserError(f"{explain(error, self.folder)}, then start again")
            if isinstance(error, UserError):
                code = self._tell_mistake(error)
                self.stall.clear()
                os._exit(code)
            gone = self.watch.wait_for_gone(seconds=0.5) if self.watch is not None else []
            message = f"{type(error).__name__}: {error}"
            if is_out_of_memory(error):
                stage = self.place.rank // (self.layout.zero_size * self.layout.tensor)
                text = explain_out_of_memory(self.recipe, self.layout, stage, self.device)
                self._tell(text, message, event="out_of_memory")
            elif gone:  # what this rank came across follows from it
                self._tell(
                    f"{_names(gone)} ended (rank {self.place.rank} saw it by {type(error).__name__})", None, gone=gone
                )
            elif (lost := faults.lost_connection(error)) and (others := self._elsewhere()):
                self._tell_lost(others, lost)
            else:
                self._tell(message, traceback.format_exc())
        finally:
            self.stall.clear()
            os._exit(1)

    def _has_stopped(self) -> bool:
        """Whether a rank of this start has stopped it before the first step."""
        return self.begun and metrics.read_outcome(self.folder) == "stopped"

    def _stop_before_first_step(self, name: str) -> str:
        """Called when a signal ends the start, in a thread perhaps: who has asked for it."""
        self.stall.clear()
        if self.watch is not None:
            self.watch.stop()
            # Launchers send SIGTERM to all that is left when a rank has died.
            gone = self.watch.wait_for_gone(seconds=0.5) if name == "SIGTERM" else []
            if gone and not self._has_stopped():
                self._tell(f"{_names(gone)} ended", None, gone=gone)
                os._exit(1)
        if self.begun and self._is_in_vain():
            print(f"rank {self.place.rank} ends, since another rank failed", file=sys.stderr, flush=True)
            os._exit(1)
        if self.journal is not None:
            self.journal.close()
        if self._has_stopped():
            return metrics.read_message(self.folder).removeprefix("asked by ") or name
        if self.begun:
            with suppress(OSError):
                self._note_stop(name)
        return name

    def _note_stop(self, name: str) -> None:
        newest = keep.newest(self.folder)
        step = keep.step_of(newest) if newest else 0
        facts = {"step": step, "checkpoint": newest and str(newest)}
        metrics.write_status(self.folder, "stopped", message=f"asked by {name}", **facts)
        text = f"stopped at step {step}, before the first step of a start: asked by {name}; start again to go on"
        metrics.append_event(self.folder, "stop", step, text, asked_by=name)

    def _elsewhere(self) -> list[Peer]:
        """The ranks of other machines."""
        return [peer for peer in self.peers if peer.host != self.peers[self.place.rank].host]

    def _tell_lost(self, others: list[Peer], lost: str) -> None:
        """A connection to another machine broke. A rank there that lives has seen who ended, and says so."""
        self._wait_for_word()
        hosts: dict[str, list[int]] = {}
        for peer in others:
            hosts.setdefault(peer.host, []).append(peer.rank)
        names = " or ".join(f"host {host} ({spans(ranks)})" for host, ranks in hosts.items())
        self._tell(f"{names} is gone, or the network to it ({lost})", None, gone=others)

    def _tell_mistake(self, error: UserError) -> int:
        """What the user can mend came up during the run: on all ranks, or on this one alone. The exit code."""
        try:
            first = metrics.claim_failure(self.folder, self.start)
        except OSError:  # the run folder is gone or full: all ranks have come across that
            first = self.place.local_rank == 0
        if self.journal is not None:
            self.journal.close()
        if first:
            with suppress(OSError):
                newest, rank = keep.newest(self.folder), self.place.rank
                facts = {"rank": rank, "step": self.step, "checkpoint": newest and str(newest)}
                metrics.write_status(self.folder, "failed", message=str(error), **facts)
                if self.trainer is not None:
                    metrics.append_event(self.folder, "failure", self.step, str(error), rank=rank)
        return _refuse(error, speaks=first)

    def _wait_for_word(self) -> None:
        """Wait a little until another rank says why the run fails."""
        deadline = time.monotonic() + WORD_SECONDS
        while not self._is_in_vain() and time.monotonic() < deadline:
            time.sleep(0.1)

    def _claim_stall(self, verdict: Verdict) -> int:
        """Called in a thread of one rank: no rank goes on. The exit code of all: another than that of a stall where the
        run has ended or failed otherwise.
        """
        with suppress(OSError):
            if not self.begun:
                metrics.begin_status(self.folder)  # what is there is of an earlier start
            outcome = metrics.read_outcome(self.folder)
            if outcome in ("finished", "stopped"):
                return 0 if outcome == "finished" else EXIT_STOPPED
            newest, culprit = keep.newest(self.folder), verdict.culprits[0]
            if not metrics.fail_status(self.folder, culprit, verdict.conclusion, newest, self.start, self.step):
                return 1
        return EXIT_STALLED

    def _tell_stall(self, verdict: Verdict) -> None:
        """Called in a thread, when all ranks have been told to end."""
        with self._telling:
            print(f"{verdict.table}\n{verdict.conclusion}", file=sys.stderr, flush=True)
            print(f"stacks of all ranks: {self.folder}/stacks", file=sys.stderr, flush=True)
            with suppress(OSError):
                culprits, table = verdict.culprits, verdict.table.splitlines()
                metrics.append_event(self.folder, "stall", self.step, verdict.conclusion, ranks=culprits, table=table)
            if self.journal is not None:
                self.journal.close()

    def _look_for_stragglers(self, seen: Mapping[int, Seen]) -> None:
        """Called in a thread, again and again."""
        if self.journal is None or (found := self.stragglers.look(seen)) is None:
            return
        record = seen[found.rank].record
        assert record is not None
        text = (
            f"step {record.step}: rank {found.rank} (host {record.host}, process {record.pid}) is slow: "
            f"{found.seconds:.3g} s a step without communication, {found.ratio:.2f} times the median of its stage's "
            f"ranks, most in {found.phase} ({found.phase_seconds:.3g} s, median {found.phase_median:.3g} s)"
        )
        with suppress(Exception):  # what the journal's thread has come across is raised in the main thread
            self.journal.event("straggler", record.step, text, host=record.host, **asdict(found))

    def _tell(self, message: str, trace: str | None, event: str = "failure", gone: Sequence[Peer] = ()) -> None:
        """Say why the run fails, in status.json and on stderr, unless another rank has: this follows from it then."""
        rank = self.place.rank
        with self._telling:
            try:
                culprit, newest = gone[0].rank if gone else rank, keep.newest(self.folder)
                first = metrics.fail_status(self.folder, culprit, message, newest, self.start, self.step)
            except OSError as error:  # a full disk, say: then stderr must do
                first, message = True, f"{message} (and status.json can't be written: {error.strerror})"
            if not first:
                print(f"rank {rank} ends, since another rank failed", file=sys.stderr, flush=True)
            else:
                print(f"rank {rank} failed: {message}" + (f"\n{trace}" if trace else ""), file=sys.stderr, flush=True)
            if self.journal is not None:
                self.journal.close()
            if first:
                with suppress(OSError):
                    metrics.append_event(self.folder, event, self.step, message, rank=rank)


def _names(peers: list[Peer]) -> str:
    return ", ".join(f"rank {peer.rank} (process {peer.pid})" for peer in peers)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launchers/train.py",
        description="Train. Started by `deepspeed`, `torchrun` or `srun`.",
        epilog="example: deepspeed --num_gpus 8 launchers/train.py launchers/recipes/demo.yaml schedule.steps=100",
    )
    parser.add_argument("recipe", help="recipe file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replace a value of the recipe")
    parser.add_argument("--deepspeed_config", help="DeepSpeed JSON file; replaces the recipe's deepspeed_config")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    return parser.parse_intermixed_args(arguments)


def _load(options: argparse.Namespace) -> tuple[Tokenizer, Recipe]:
    """The tokenizer, and the recipe with overrides and with the tokenizer's vocabulary."""
    config = recipe.load(options.recipe, options.overrides)
    if options.deepspeed_config:
        config = config.model_copy(update={"deepspeed_config": options.deepspeed_config})
    return open_tokenizer(config)


def describe_sources(recipe: Recipe, stream: TrainStream) -> dict[str, dict[str, Any]]:
    """Source -> weight, tokens, documents, samples of an epoch, and how often the whole run goes through it."""
    epochs = stream.epochs(recipe.schedule.steps * recipe.batch.global_samples)
    return {
        name: {**facts, "num_documents": corpus.num_documents, "epochs": count}
        for (name, facts), corpus, count in zip(stream.facts().items(), stream.corpora, epochs, strict=True)
    }


@contextmanager
def _writing(run: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"run: cannot write the folder {run}: {error.strerror}; mend that or name another") from None


def _refuse(error: UserError, speaks: bool) -> int:
    """Say a user's mistake if this rank is the one to; the exit code.

    All ranks find it, and the launcher ends all when the first is gone: the silent ones wait for the one that speaks.
    """
    if speaks:
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(5)
    return 2
