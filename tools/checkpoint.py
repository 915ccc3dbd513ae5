"""`megacode checkpoint`: look at checkpoints, check them, and remove old ones."""

import math
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megacode.errors import UserError, explain
from megacode.plan.units import size
from megacode.tools.output import JsonFile, json_output

if TYPE_CHECKING:
    from megacode.checkpoint.reader import CheckpointReader

app = typer.Typer(help="Look at checkpoints, check them, and remove old ones.", no_args_is_help=True)

Place = Annotated[Path, typer.Argument(metavar="PATH", help="A step folder, or a run folder: its newest.")]


@app.command()
def inspect(
    path: Place,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="Also each tensor: shape, and the slices of files.")
    ] = False,
    json: JsonFile = None,
) -> None:
    """Print what a checkpoint is: step, model, who wrote it, files, and what the run was trained on until then.

    Example: megacode checkpoint inspect runs/mine
    """
    from megacode.checkpoint.keep import finished
    from megacode.checkpoint.reader import CheckpointReader
    from megacode.tools.convert import checkpoint_folder, run_folder

    with json_output(json) as write:
        reader = CheckpointReader(checkpoint_folder(path))
        found = _facts(reader)
        found["others"] = [str(folder) for folder in finished(run_folder(path)) if folder != reader.folder]
        for line in _text(found):
            print(line)
        if tensors:
            found["tensors"] = reader.manifest["tensors"]
            for name, entry in found["tensors"].items():
                print(f"{name}  {_shape(entry['shape'])}  {_slices(entry)}")
        write(found)


@app.command()
def verify(
    path: Place,
    every: Annotated[bool, typer.Option("--all", help="Every checkpoint of the run, the oldest first.")] = False,
    json: JsonFile = None,
) -> None:
    """Read a checkpoint whole and compare sizes and checksums with its manifest; every damaged file is named.

    Exits with 1 if one is. Example: megacode checkpoint verify runs/mine --all
    """
    from megacode.checkpoint.keep import finished
    from megacode.tools.convert import checkpoint_folder, run_folder

    with json_output(json) as write:
        newest = checkpoint_folder(path)
        folders = finished(run_folder(path)) if every else [newest]
        if not folders:
            raise UserError(f"--all: {path} is one checkpoint; leave --all out, or name its run folder")
        found = [facts for folder in folders if (facts := _verified(folder, named=every)) is not None]
        write({"checkpoints": found} if every else found[0])
    if any(facts["damage"] for facts in found):
        raise typer.Exit(1)


def _verified(folder: Path, named: bool) -> dict[str, Any] | None:
    """What comes of reading a checkpoint, which is printed; None where the run has removed it meanwhile.

    Args:
        named: one of several, so that a manifest that cannot be read is damage as well, and no end.
    """
    from megacode.checkpoint.reader import CheckpointReader
    from megacode.tools.prepare import reading_bar

    files: dict[str, Any] = {}
    try:
        reader = CheckpointReader(folder)
    except UserError as error:
        if not named:
            raise
        damage = [str(error).split("; ")[0]]
    else:
        files = reader.manifest["files"]
        with reading_bar(f"Verifying {folder.name}", sum(entry["bytes"] for entry in files.values())) as advance:
            damage = list(reader.damage(advance=advance))
    if named and not folder.is_dir():
        return None
    num_bytes = sum(entry["bytes"] for entry in files.values())
    for each in damage:
        print(f"WRONG: {each}", flush=True)
    if not damage:
        print(f"{folder}: right: {_count(len(files), 'file')}, {size(num_bytes)}", flush=True)
    return {"checkpoint": str(folder), "files": len(files), "bytes": num_bytes, "damage": damage}


@app.command()
def prune(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    keep_last: Annotated[int, typer.Option(min=1, help="Keep so many of the newest.")],
    keep_every: Annotated[
        int | None, typer.Option(min=1, help="Keep those of the multiples of this step, too.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    json: JsonFile = None,
) -> None:
    """Remove a run's old checkpoints, as checkpoint.keep_last and checkpoint.keep_every of the recipe do.

    The newest stays, and so does what is being written: the run may go on meanwhile. Nothing is removed where one of
    those that stay is damaged, as far as manifest and sizes of files tell. Whether another recipe's
    checkpoint.start_from names one of those to be removed, nobody can know.

    Example: megacode checkpoint prune runs/mine --keep-last 3 --keep-every 10000 --dry-run
    """
    from megacode.checkpoint import keep
    from megacode.tools.convert import run_folder

    with json_output(json) as write:
        run = run_folder(run)
        if not (run / "checkpoints").is_dir():
            raise UserError(f"{run} has no folder checkpoints; name a run folder")
        removed = keep.surplus(run, keep_last, keep_every)
        _check_kept([folder for folder in keep.finished(run) if folder not in removed])
        freed = 0
        for folder in removed:
            num_bytes = _num_bytes(folder)
            if not dry_run:
                try:
                    keep.remove(folder)
                except OSError as error:
                    raise UserError(explain(error, folder)) from None
            freed += num_bytes
            print(f"{'would remove' if dry_run else 'removed'} {folder} ({size(num_bytes)})")
        left = [folder for folder in keep.finished(run) if folder not in removed]
        print(f"{len(left)} kept, {len(removed)} {'to remove' if dry_run else 'removed'} ({size(freed)})")
        write({"removed": list(map(str, removed)), "kept": list(map(str, left)), "bytes": freed, "dry_run": dry_run})


def _check_kept(folders: list[Path]) -> None:
    """Refuse to remove others where one of these is damaged: what is removed may be the last good one.

    Raises:
        UserError: a manifest cannot be read, or a file is missing or has another size.
    """
    from megacode.checkpoint.reader import CheckpointReader

    for folder in folders:
        try:
            damage = next(CheckpointReader(folder).damage(share=None), None)
        except UserError as error:
            damage = str(error)
        if damage is not None and folder.is_dir():  # else the run has removed it meanwhile
            raise UserError(
                f"nothing is removed, since {folder} would be kept and is damaged: {damage.split(';')[0]}; see what "
                f"`megacode checkpoint verify {folder}` says, and remove that folder first"
            )


def _num_bytes(folder: Path) -> int:
    total = 0
    with suppress(FileNotFoundError):  # the run removes it too
        total = sum(file.stat().st_size for file in folder.iterdir())
    return total


def _facts(reader: "CheckpointReader") -> dict[str, Any]:
    manifest = reader.manifest
    return {
        "checkpoint": str(reader.folder),
        "step": reader.step,
        "progress": asdict(reader.progress),
        "model": reader.model.model_dump(mode="json"),
        "num_parameters": sum(math.prod(entry["shape"]) for entry in manifest["tensors"].values()),
        "precision": reader.precision,
        "dtype": manifest.get("dtype", "fp32"),
        "optimizer": reader.optimizer,
        "layout": _layout(reader),
        "source": manifest.get("source"),
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "files": manifest["files"],
    }


def _layout(reader: "CheckpointReader") -> dict[str, int] | None:
    """Of the run that wrote it; None where no run did, or its recipe is missing."""
    from megacode.recipe import load

    path, processes = reader.folder / "recipe.yaml", reader.manifest.get("world_size")
    if not path.is_file():
        return None
    parallel = load(path).parallel
    layout = {key: getattr(parallel, key) for key in ("pipeline", "virtual_stages", "context", "tensor", "zero")}
    if processes is None:  # a checkpoint of before this was written down
        return layout
    ranks = parallel.pipeline * parallel.context * parallel.tensor
    return {"processes": processes, "data": processes // ranks, **layout}


def _text(found: dict[str, Any]) -> list[str]:
    model, progress = found["model"], found["progress"]
    shape = f"{model['layers']} layers, hidden {model['hidden']}, {model['vocabulary']} words"
    shape += f", rope_theta {model['rope_theta']:g}"
    lines = {
        "checkpoint": found["checkpoint"],
        "step": f"{found['step']} (Adam's count {progress['adam_step']}, next sample {progress['next_sample']})",
        "model": f"{model['preset'] or 'of its own'}: {found['num_parameters']:,} parameters; {shape}",
        "weights": f"{found['dtype']}, of a run in {found['precision']}" if found["optimizer"] else found["dtype"],
        "optimizer": found["optimizer"] or "none",
        "written by": _writer(found),
        "files": f"{len(found['files'])}, {size(found['bytes'])}",
    }
    text = [f"{key:12}{value}" for key, value in lines.items()]
    for name, entry in found["files"].items():
        text.append(f"  {name}  {size(entry['bytes'])}  {entry['sha256'][:12]}")
    for source, counts in progress["ledger"].items():
        text.append(f"{'source':12}{source}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))
    if found["others"]:
        text.append(f"{'others':12}" + ", ".join(Path(folder).name for folder in found["others"]))
    return text


def _writer(found: dict[str, Any]) -> str:
    if found["source"] is not None:
        return f"a conversion from {found['source']['format']}"
    if found["layout"] is None:
        return "unknown (recipe.yaml is missing)"
    layout = dict(found["layout"])
    processes = layout.pop("processes", None)
    ranks = ", ".join(f"{key} {value}" for key, value in layout.items())
    return f"a run: {ranks}" if processes is None else f"a run of {_count(processes, 'process', 'es')}: {ranks}"


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{plural if number != 1 else ''}"


def _shape(shape: list[int]) -> str:
    return " x ".join(map(str, shape))


def _slices(entry: dict[str, Any]) -> str:
    if entry["dim"] is None:
        return f"whole in {entry['slices'][0]['rank']}"
    return f"dim {entry['dim']}: " + ", ".join(f"{s['start']}-{s['stop']} in {s['rank']}" for s in entry["slices"])
