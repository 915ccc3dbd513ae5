"""The house rules that a machine can check: who may import whom, and sizes."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ALLOWED = {
    "errors": set(),
    "importing": set(),
    "kernels": set(),
    "model.presets": set(),
    "recipe": {"errors", "model.presets"},
    "parallel.stages": set(),
    "parallel.schedule": set(),
    "parallel.timeline": {"parallel.schedule"},
    "plan.model": {"recipe"},
    "engine.config": {"errors", "recipe", "plan.model"},
    "plan": {
        *("errors", "recipe", "parallel.stages", "parallel.schedule", "parallel.timeline", "engine.config"),
        "plan",
    },
    "data": {"errors", "recipe", "data"},
    "model": {"errors", "recipe", "kernels", "model"},
    "parallel": {"errors", "recipe", "plan", "kernels", "model", "parallel"},
    "engine": {"errors", "importing", "recipe", "plan", "kernels", "model", "parallel", "engine"},
    "checkpoint": {"errors", "recipe", "plan", "kernels", "model", "data", "checkpoint"},
    "train": {"errors", "importing", "recipe", "plan", "model", "data", "parallel", "engine", "checkpoint", "train"},
    "doctor": {
        *("errors", "importing", "recipe", "plan", "kernels", "model", "data"),
        *("parallel", "engine", "checkpoint", "train", "doctor"),
    },
    "submit": {"errors", "recipe", "submit"},
    "tools.output": {"errors"},
    "tools.bench": {
        *("errors", "recipe", "plan", "kernels", "model", "data", "parallel", "engine", "checkpoint", "train"),
        "tools.output",
        "tools.bench",
    },
    "tools": {
        *("errors", "recipe", "plan", "kernels", "model", "data", "checkpoint", "doctor", "submit", "tools"),
        *("parallel.stages", "parallel.schedule", "parallel.timeline"),
    },
    "cli": {"errors", "tools"},
}  # fmt: skip
"""Part -> the parts it may import. The most specific entry counts, for the importer and for what it imports."""

PURE = (
    *("errors", "importing", "recipe", "plan", "model.presets", "data", "cli", "engine.config", "submit"),
    *("parallel.stages", "parallel.schedule", "parallel.timeline"),
)
"""These import neither torch nor deepspeed, so that planning, preparing and --help are quick; nor do tools."""

LATE = ("tools.bench.kernel_cases",)
"""What a tool imports when it begins to work."""


def sources():
    paths = [path for path in (ROOT / "megacode").rglob("*.py") if not path.is_symlink()]
    paths += [*(ROOT / "kernels").glob("*.py"), *(ROOT / "tools").rglob("*.py")]
    return sorted({path.resolve() for path in paths})


def module_name(path: Path) -> str:
    """Dotted name below megacode: kernels/rope.py -> kernels.rope."""
    relative = path.relative_to(ROOT).with_suffix("")
    parts = relative.parts[1:] if relative.parts[0] == "megacode" else relative.parts
    return ".".join(parts).removesuffix(".__init__") or "__init__"


def part(name: str) -> str:
    words = name.split(".")
    for length in range(len(words), 0, -1):
        if ".".join(words[:length]) in ALLOWED:
            return ".".join(words[:length])
    return name


def imports(path: Path, top_level_only: bool) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_dependencies_point_one_way(path):
    name = module_name(path)
    if name == "__init__":
        return
    allowed = ALLOWED[part(name)] | {part(name)}
    for imported in imports(path, top_level_only=False):
        if not imported.startswith("megacode."):
            continue
        target = imported.removeprefix("megacode.")
        assert part(target) in allowed or part(target).split(".")[0] in allowed, f"{name} imports {imported}"


def test_only_the_engine_imports_deepspeed():
    users = {module_name(p) for p in sources() if any(i.split(".")[0] == "deepspeed" for i in imports(p, False))}
    assert users == {"engine.optimizer", "engine.private", "engine.zero", "tools.bench.peers"}


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_pure_parts_do_not_import_torch(path):
    name = module_name(path)
    if part(name) in PURE or name.split(".")[0] in PURE or (name.startswith("tools") and name not in LATE):
        heavy = {i.split(".")[0] for i in imports(path, top_level_only=True)} & {"torch", "deepspeed", "transformers"}
        assert not heavy


def test_sizes():
    for path in [*sources(), *(ROOT / "tests").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 600, f"{path} has more than 600 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and not path.is_relative_to(ROOT / "tests"):
                assert node.end_lineno - node.lineno < 80, f"{path}: {node.name} is longer than a screen"


def test_nothing_is_installed_at_top_level_but_megacode():
    from setuptools import find_packages

    packages = find_packages(str(ROOT), include=["megacode", "megacode.*"])
    assert {"megacode", "megacode.kernels", "megacode.tools", "megacode.engine"} <= set(packages)
    assert {package.split(".")[0] for package in packages} == {"megacode"}
