"""C++ source text -> a Python callable, through the tool chain that Inductor compiles its own CPU kernels with.

Inductor caches the shared object on disk by the content of the source, the flags and the compiler.
"""

from collections.abc import Callable, Sequence


def compile_cpp(argument_types: Sequence[str], source: str) -> Callable[..., None]:
    """The function `kernel` of `source`; pointers are passed as tensors, int64_t and float as numbers.

    RuntimeError (or one of its subclasses) where there is no compiler, or where it refuses the source.
    """
    from torch._inductor.codecache import CppPythonBindingsCodeCache
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        kernel: Callable[..., None] = CppPythonBindingsCodeCache.load_pybinding(argument_types, source)
    except (InvalidCxxCompiler, CppCompileError, OSError) as e:
        raise RuntimeError(f"{type(e).__name__}: {_first_error(str(e))}") from e
    return kernel


def _first_error(message: str) -> str:
    """The line of a compiler's output that says what was wrong."""
    lines = [line for line in message.splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[0] if lines else "no message")
