"""What one preparation is: its inputs and options, cut into units, on disk so that any process can work on a unit."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megacode.data.durable import rename
from megacode.data.preparing.corpus import Corpus, Document, Piece, Unit, sum_bytes
from megacode.data.preparing.filters import Filters
from megacode.data.preparing.lock import locked
from megacode.data.preparing.readers import Fields, Watch
from megacode.data.shards import Shards
from megacode.data.tokenizer import Tokenizer
from megacode.errors import UserError

_FORMAT = 2
_JOB, _UNITS, _PLACES = "job.json", "units.jsonl", "units.places"
_PLACE = struct.Struct("<Q")  # where a unit's line begins; all are of one width, so that none but it is read


@dataclass(frozen=True)
class Job:
    """A preparation that has been planned.

    Attributes:
        corpus: Inputs, as absolute paths, and how they are read.
        source: The inputs, in words; goes to PREFIX.json.
        tokenizer_path, tokenizer_sha256: The tokenizer.
        output, valid: Prefixes of the training and of the validation shard, as absolute paths; `valid` may be None.
        valid_fraction: Share of the documents that go there.
        dedup: Which duplicates are left out: None, exact, or near (which includes exact).
        benchmarks: Names and sha256 of the benchmarks whose text is left out.
        num_units, num_bytes: What there is to read.
        units_sha256: Of the list of units: it differs where a file's name, size or time of change does.
        engine: Of a job that was read from its folder, what was found to compute the tokenizer's ids, so that workers
            need not find out. A job is not known by it, since all engines give the same.
    """

    corpus: Corpus
    source: str
    tokenizer_path: str
    tokenizer_sha256: str
    output: str
    valid: str | None
    valid_fraction: float
    dedup: str | None = None
    benchmarks: str = ""
    num_units: int = 0
    num_bytes: int = 0
    units_sha256: str = ""
    engine: str = dataclasses.field(default="", compare=False)

    @property
    def folder(self) -> Path:
        """PREFIX.parts, where the parts wait until they are merged."""
        return parts_folder(self.output)

    @property
    def prefixes(self) -> dict[str, str]:
        """Side -> prefix of its shard: train, and valid if there is one."""
        return {"train": self.output, **({} if self.valid is None else {"valid": self.valid})}

    def unit(self, unit: int) -> Unit:
        """The pieces of a unit."""
        with (self.folder / _UNITS).open("rb") as units, (self.folder / _PLACES).open("rb") as places:
            places.seek(unit * _PLACE.size)
            units.seek(*_PLACE.unpack(places.read(_PLACE.size)))
            return tuple(Piece(*piece) for piece in json.loads(units.readline()))

    def part(self, unit: int) -> Path:
        """The folder of a unit's part; it is there when the part is finished."""
        return self.folder / f"{unit:06d}"

    def dropped(self, unit: int) -> list[Path]:
        """The lists of documents of a unit that are not to be tokenized, by step."""
        return sorted((self.folder / "dropped").glob(f"{unit:06d}.*.jsonl"))

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            UserError: it cannot be read, or is not the one that the job was planned with.
        """
        tokenizer = Tokenizer(self.tokenizer_path, known=self.engine)
        if tokenizer.sha256 != self.tokenizer_sha256:
            raise UserError(f"{self.tokenizer_path} has changed since {self.folder} was made; remove that folder")
        return tokenizer

    @staticmethod
    def load(folder: str | Path) -> "Job":
        """Read a job from its folder.

        Raises:
            UserError: there is none, or it is of another version.
        """
        path = Path(folder, _JOB)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("format") != _FORMAT:
                raise ValueError
            corpus = values.pop("corpus")
            filters, fields = corpus.pop("filters"), corpus.pop("fields")
            lists = {key: tuple(corpus[key]) for key in ("inputs", "suffixes", "exclude")}
            filters["languages"] = tuple(filters["languages"])
            return Job(Corpus(**lists, fields=Fields(**fields), filters=Filters(**filters)), **values)
        except FileNotFoundError:
            raise UserError(f"{path} is missing; `megacode prepare` makes it") from None
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path} cannot be understood; remove {folder} and prepare again") from None

    def start(self) -> "Job":
        """Cut the inputs into units and write the job into its folder, or go on with it where it stands there already.
        Nothing is written where it is `finished`.

        Raises:
            UserError: the inputs cannot be read, the folder holds parts of another job, a shard stands there already,
                or another command is at work.
        """
        units = self.corpus.plan(list(self.prefixes.values()))
        first = next(units, None)  # inputs that are not there are told before a folder is made
        with contextlib.ExitStack() as stack:
            if not self.planned:  # else others may be at work on it, and nothing is written
                stack.enter_context(locked(self.output))
            return self._planned(itertools.chain([] if first is None else [first], units))

    @property
    def planned(self) -> bool:
        """Whether a job, this one or another one, stands in the folder."""
        return (self.folder / _JOB).exists()

    def _planned(self, units: Iterator[Unit]) -> "Job":
        goes_on = self.planned
        made = not self.folder.exists()
        if not goes_on:
            self._refuse_parts()
            self.folder.mkdir(parents=True, exist_ok=True)
        temporary, own_places = (self.folder / f"{name}.{os.getpid()}.tmp" for name in (_UNITS, _PLACES))
        try:
            with temporary.open("wb") as file, own_places.open("wb") as places:
                job = self._cut(units, file, places)
            if goes_on:
                planned = Job.load(self.folder)
                _same(planned, job)
                job = dataclasses.replace(job, engine=planned.engine)
            elif job.finished() is None:
                self._refuse_shards()
                rename(temporary, self.folder / _UNITS)
                rename(own_places, self.folder / _PLACES)
                job._write()
        finally:
            temporary.unlink(missing_ok=True)
            own_places.unlink(missing_ok=True)
            if made and not self.planned:
                shutil.rmtree(self.folder)
        return job

    def identity(self, side: str) -> str:
        """Of what a side's shard is made: SHA-256 of options and of the list of units; goes to PREFIX.json as `job`."""
        values = dataclasses.asdict(self) | {"valid": self.valid is not None, "side": side}
        values["corpus"].pop("inputs")  # where they are does not matter
        for key in ("output", "tokenizer_path", "engine"):
            values.pop(key)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def finished(self) -> dict[str, dict[str, Any]] | None:
        """What is in each PREFIX.json, where this very job has been done and its parts are gone; else None."""
        summary: dict[str, dict[str, Any]] = {}
        for side, prefix in () if self.planned else self.prefixes.items():
            try:
                summary[side] = Shards(prefix).facts
            except UserError:  # there is none, or what is left of one
                return None
            if summary[side].get("job") != self.identity(side):
                return None
        return summary or None

    def _cut(self, units: Iterator[Unit], file: BinaryIO, places: BinaryIO) -> "Job":
        """Write the list of units, and where in it each begins."""
        sha256, num_units, num_bytes = hashlib.sha256(), 0, 0
        for unit in units:
            line = json.dumps(unit).encode() + b"\n"
            places.write(_PLACE.pack(file.tell()))
            file.write(line)
            sha256.update(line)
            num_units, num_bytes = num_units + 1, num_bytes + sum_bytes(unit)
        return dataclasses.replace(self, num_units=num_units, num_bytes=num_bytes, units_sha256=sha256.hexdigest())

    def _refuse_shards(self) -> None:
        for prefix in self.prefixes.values():
            if os.path.lexists(f"{prefix}.bin"):
                raise UserError(
                    f"{prefix}.bin is there already; remove it with its .idx and .json, or name another prefix"
                )

    def _refuse_parts(self) -> None:
        if self.folder.exists() and any(path.is_dir() for path in self.folder.iterdir()):
            raise UserError(f"{self.folder} has no {_JOB} that says what its parts are of; remove that folder")

    def _write(self) -> None:
        path = self.folder / _JOB
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        # Here is who finds it: this process goes on with the tokenizer at hand.
        values = {"format": _FORMAT, **dataclasses.asdict(self), "engine": self.tokenizer.engine.name}
        temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")
        rename(temporary, path)


def parts_folder(output: str | Path) -> Path:
    """PREFIX.parts."""
    return Path(f"{output}.parts")


def documents(job: Job, unit: int, watch: Watch | None = None) -> Iterator[Document]:
    """The documents of a unit that pass the filters, in order. Their ordinal in it is what lists of dropped ones name.

    Raises:
        UserError: a file cannot be read, or has changed since the job was planned.
    """
    return job.corpus.read(job.unit(unit), watch)


def _same(old: Job, new: Job) -> None:
    mend = f"give the same inputs and options to go on with it, or remove {old.folder}"
    before, now = (_flat(dataclasses.asdict(job)) for job in (old, new))
    for key in now:
        if key in ("num_units", "num_bytes", "engine"):
            continue
        if key == "units_sha256" and before[key] != now[key]:
            raise UserError(f"{old.folder} is of inputs that have changed since; {mend}")
        if before[key] != now[key]:
            raise UserError(f"{old.folder} is of a preparation with another {key} ({before[key]}); {mend}")


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """The values of nested dictionaries by the keys of the innermost ones."""
    return {
        name: value
        for key, inner in values.items()
        for name, value in (_flat(inner) if isinstance(inner, dict) else {key: inner}).items()
    }
