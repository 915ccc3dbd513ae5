"""Packages: which versions are here, which are missing, which are not what megacode was checked with.

Without torch at import, so that a broken torch is a line of the report and not a traceback.
"""

import importlib
import platform
import sys
from collections.abc import Iterator
from importlib import metadata, util

from packaging.requirements import Requirement

from megacode.doctor.finding import Finding, verdict

INSTALL = "pip install -c constraints.txt -e . (in a checkout of megacode)"
OPTIONAL = {
    "triton": "RoPE in one kernel on a GPU",
    "wandb": "logging.wandb",
    "tensorboard": "logging.tensorboard",
}
"""Distribution -> what it is for."""
IMPORTED = ("torch", "sentencepiece")
"""What training imports and what is known to be found but not to load when its build is for another machine."""


def check_packages() -> Iterator[Finding]:
    """Python, what `megacode` requires, and what it can use."""
    python = sys.version_info[:2]
    yield verdict(
        "python",
        (3, 11) <= python <= (3, 12),
        f"{platform.python_version()}",
        "megacode is for 3.11 and 3.12; make a virtual environment with one of them",
    )
    if installed("megacode") is None:
        yield Finding("megacode", "WRONG", "is not installed: what it requires is not known", INSTALL)
        return
    minor = []
    for requirement in _requirements():
        if requirement.name == "deepspeed":  # check_deepspeed
            continue
        finding = check_package(requirement)
        if finding.state == "ok" and requirement.name not in (*IMPORTED, "transformers"):
            minor.append(f"{requirement.name} {finding.text}")
        else:
            yield finding
    yield Finding("also required", "ok", ", ".join(minor))
    yield from map(_optional, OPTIONAL)


def check_package(requirement: Requirement) -> Finding:
    """A required package: there, in a version that megacode accepts, and importable where that is known to fail."""
    name, mend = requirement.name, INSTALL
    version = installed(name)
    if version is None:
        return Finding(name, "WRONG", "is not installed, and training needs it", mend)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(name, "WRONG", f"{version} is installed and megacode needs {requirement.specifier}", mend)
    if name in IMPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:
            return Finding(name, "WRONG", f"{version} is installed but does not import: {one_line(error)}", mend)
    return Finding(name, "ok", version)


def check_deepspeed() -> Finding:
    """DeepSpeed must be the very version whose private names the engine touches: another gives wrong gradients."""
    version = installed("deepspeed")
    if version is None:
        return Finding("deepspeed", "WRONG", "is not installed, and training needs it", INSTALL)
    try:
        wanted = importlib.import_module("megacode.engine.private").VERSION
    except Exception as error:
        text = f"{version} is installed but does not import as it must: {one_line(error)}"
        return Finding("deepspeed", "WRONG", text, INSTALL)
    right = version.split("+")[0] == wanted
    text = version if right else f"{version} is installed and megacode works with {wanted} only"
    return verdict("deepspeed", right, text, f"pip install deepspeed=={wanted}")


def check_flash_attn(cuda: bool) -> Finding:
    """flash-attn, which is never needed."""
    version = installed("flash-attn")
    if version is not None:
        return Finding("flash-attn", "ok", version)
    if not cuda:
        return Finding("flash-attn", "skipped", "serves NVIDIA GPUs only; not needed here")
    return Finding(
        "flash-attn",
        "missing",
        "not needed: PyTorch's attention or ours serves; the fastest on most GPUs",
        "pip install flash-attn --no-build-isolation (a wheel for this torch saves an hour of compiling)",
    )


def check_apex() -> Finding:
    """NVIDIA's apex, which is never needed, and PyPI's project of the same name, which is often installed instead."""
    from megacode.kernels.packages import nvidia_apex_available

    if nvidia_apex_available():
        return Finding("apex", "ok", "NVIDIA's; for optimizer.backend: apex and kernels.rms_norm: apex")
    if util.find_spec("apex") is not None:
        return Finding("apex", "missing", "the installed one is not NVIDIA's fused one", "pip uninstall apex")
    return Finding("apex", "missing", "NVIDIA's; not needed. PyPI's apex is another project")


def installed(distribution: str) -> str | None:
    """The version of a distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def one_line(error: BaseException, limit: int = 200) -> str:
    """An exception in a line: its class and the start of its message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:limit]}"


def _requirements() -> list[Requirement]:
    """What `megacode`'s own metadata asks for, without extras."""
    requirements = [Requirement(text) for text in metadata.requires("megacode") or []]
    return [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


def _optional(name: str) -> Finding:
    version = installed(name)
    if version is None:
        return Finding(name, "missing", f"only for {OPTIONAL[name]}", f"pip install {name}")
    return Finding(name, "ok", version)
