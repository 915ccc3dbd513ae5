"""Weights & Biases and TensorBoard."""

import importlib.util
import netrc
import os
import secrets
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from megacode.errors import UserError
from megacode.recipe import Recipe
from megacode.train.journal import Tracker


def check_trackers(recipe: Recipe) -> None:
    """Refuse a recipe that asks for a tracker that is not installed.

    Raises:
        UserError: names the key and the package.
    """
    for key, package, asked in (
        ("wandb", "wandb", recipe.logging.wandb is not None),
        ("tensorboard", "tensorboard", recipe.logging.tensorboard),
    ):
        spec = importlib.util.find_spec(package) if asked else None
        if asked and (spec is None or spec.origin is None):  # a folder of that name is no package
            raise UserError(
                f"logging.{key} is asked for and {package} is not installed; pip install -c constraints.txt {package}, "
                f"or leave the key out"
            )


def open_trackers(recipe: Recipe, step: int, facts: dict[str, Any]) -> list[Tracker]:
    """The recipe's trackers.

    Args:
        recipe: kept as the run's configuration.
        step: the step that the run goes on from.
        facts: what else the run's page should say: layout, versions, hosts.
    """
    trackers: list[Tracker] = []
    run, project = Path(recipe.run), recipe.logging.wandb
    try:
        if project is not None:
            trackers.append(Wandb(run, project, {**recipe.model_dump(mode="json"), "start": facts}))
    except Exception as error:  # no network, a key that is refused: the run is not worth less
        print(f"Wandb failed and is dropped: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    if recipe.logging.tensorboard:
        trackers.append(TensorBoard(run, step))
    return trackers


class Wandb:
    """A Weights & Biases run that a resumed run goes on with: its id is kept in RUN/wandb/id.

    Offline unless somebody is logged in; then `wandb sync RUN/wandb/offline-run-*` sends it later. WANDB_MODE decides
    where it is set.
    """

    def __init__(self, run: Path, project: str, config: dict[str, Any]) -> None:
        import wandb

        folder = run / "wandb"
        folder.mkdir(exist_ok=True)
        id_file = folder / "id"
        if not id_file.exists() or not id_file.read_text(encoding="utf-8").strip():
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        if "WANDB_MODE" not in os.environ and not logged_in():
            os.environ["WANDB_MODE"] = "offline"
        self.run = wandb.init(
            project=project, id=id_file.read_text(encoding="utf-8").strip(), name=run.name, resume="allow", dir=run,
            config=config, settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip
        # wandb's own step must never go back, and a run that goes on from a checkpoint does.
        self.run.define_metric("*", step_metric="step")

    def log(self, values: dict[str, Any]) -> None:
        self.run.log(values)

    def close(self) -> None:
        self.run.finish()


def logged_in() -> bool:
    """Whether wandb would find a key: in WANDB_API_KEY, or in netrc for the server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class TensorBoard:
    """Scalars in RUN/tensorboard; what a run that died wrote after its last checkpoint is taken back."""

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def log(self, values: dict[str, Any]) -> None:
        for name, value in _flat(values):
            self.writer.add_scalar(name, value, values["step"])

    def close(self) -> None:
        self.writer.close()


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    pairs: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            pairs.append((prefix + name, value))
    return pairs
