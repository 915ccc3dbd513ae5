"""Triton without a GPU: its interpreter, in a process of its own, and its compiler, down to a Hopper's machine code."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
ALIGNED = ("_stride", "ffn", "columns")
"""Ends of the names of numbers that `compile_for_hopper` takes to be multiples of 16."""


def interpret(module: str, path: Path, *arguments: str) -> dict[str, Any]:
    """What `python -m MODULE PATH ARGUMENTS` saves to the path, run under the interpreter.

    The interpreter must be asked for before triton is imported and then holds for the whole process.
    """
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    subprocess.run([sys.executable, "-m", module, str(path), *arguments], env=environment, check=True, timeout=300)
    return torch.load(path)


def bf16_as_in_hardware() -> None:
    """Mend the interpreter, which cuts fp32 off to bf16, and multiplies the bits of bf16 as integers."""
    from triton import language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def nearest(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(data)).bfloat16()
            return rounded.view(torch.uint16).numpy().reshape(data.shape)
        if (source, target) == (tl.bfloat16, tl.float32):
            return (data.astype(np.uint32) << 16).view(np.float32)  # as the original, in a fraction of its time
        return convert(data, source, target, mode)

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle(nearest(x.data, tl.bfloat16, tl.float32, None), tl.float32)

    interpreter._convert_float = nearest
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)


def compile_for_hopper(kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: int) -> Any:
    """A kernel compiled for sm_90a.

    Pointers and what is `ALIGNED` are multiples of 16. What is in neither `types` nor `constants` is a 32-bit integer.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    kinds = {name: types.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if kinds[name].startswith("*") or (name.endswith(ALIGNED) and name not in constants)
    }
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def tool(name: str) -> Path:
    """A program of CUDA's that comes with triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
