"""Backends: several pieces of code that compute one operation, chosen by name.

An operation with more than one backend has a table of them, best first; ``eager`` (plain PyTorch) is always there and
comes last. Each entry tells what stands in its way::

    LIBRARY = CppLibrary(Path(__file__).with_name("kernel.cpp"))
    BACKENDS = Backends(cpp=LIBRARY.obstacle)

    if BACKENDS.choose(backend, hidden.device.type) == "cpp":      # "auto" becomes the first one that can run there
        ...

What a user names is what runs, or a ``ValueError`` says what is missing; only ``auto`` may go on to the next.

C++ sources have a plain C interface and know nothing of PyTorch: they compile in seconds with any g++ and are loaded by
ctypes. Nothing is compiled before it is needed, or asked for by :func:`compile_all`; the result stays in the user's
cache folder, under a name that follows from the source, the headers beside it, the flags, the compiler and the
processor. A call that autograd or a compiler shall see goes into a ``torch.library.custom_op``: it is one node of a
traced graph, and may tell its operations to a FLOP counter (``torch.utils.flop_counter.register_flop_formula``).
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Obstacle = Callable[[torch.device], str | None]
"""Returns why a backend cannot run on a device, with the remedy; None if it can."""

# Where arithmetic may trap, g++ leaves loops with a condition in them scalar, unless the processor has masks (AVX-512).
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


class BackendUnavailable(ValueError):
    """A backend that was asked for by name cannot run here."""


class Backends:
    """The backends of one operation, best first, ``eager`` after all of them.

    Args:
        **obstacles: what stands in the way of each.
    """

    def __init__(self, **obstacles: Obstacle) -> None:
        self.obstacles = {**obstacles, "eager": _none}

    @torch.compiler.assume_constant_result
    def choose(self, name: str, device: str | torch.device) -> str:
        """Return the backend for tensors of a device: ``name``, or for ``auto`` the first that can run there.

        Raises:
            BackendUnavailable: the named one cannot run there.
            ValueError: there is none of that name.
        """
        device = torch.device(device)
        if name == "auto":
            for backend, obstacle in self.obstacles.items():
                if obstacle(device) is None and not (obstacle is triton and interprets_triton()):
                    return backend
        self._check_name(name)
        reason = self.obstacles[name](device)
        if reason is not None:
            raise BackendUnavailable(f"backend={name!r} cannot run on {device.type}: {reason}")
        return name

    def check(self, name: str) -> None:
        """Raise what :meth:`choose` would raise on every device: for constructors, which know of no device yet."""
        if name == "auto":
            return
        self._check_name(name)
        reasons = [self.obstacles[name](torch.device(kind)) for kind in ("cpu", "cuda")]
        if None not in reasons:
            raise BackendUnavailable(f"backend={name!r} cannot run here: {reasons[0]}")

    def _check_name(self, name: str) -> None:
        if name not in self.obstacles:
            raise ValueError(f"backend={name!r}: choose one of auto, {', '.join(self.obstacles)}")


def triton(device: torch.device) -> str | None:
    """Return what stands in the way of a Triton kernel."""
    if not _is_installed("triton"):
        return "Triton is not installed; pip install triton"
    if interprets_triton():
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device; choose another backend, or set TRITON_INTERPRET=1 to try it out on the CPU"
    return None if device.type == "cuda" else "it runs on CUDA devices; move the layer and its inputs to one"


def interprets_triton() -> bool:
    """Return whether Triton's interpreter runs its kernels: on any device, to be checked and not to be used."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


def _none(device: torch.device) -> None:
    return None


class CppLibrary:
    """A C++ source that is compiled on first use and whose functions are called with tensors.

    Args:
        source: the ``.cpp`` file; its functions are ``extern "C"``. It may include headers (``.h``) of its own folder.
        *flags: for the compiler, beside ``FLAGS``.
    """

    made: ClassVar["weakref.WeakSet[CppLibrary]"] = weakref.WeakSet()
    """Every library that there is, compiled or not."""

    def __init__(self, source: Path, *flags: str) -> None:
        self.source = source
        self.flags = (*FLAGS, *flags)
        self._functions: dict[str, Any] = {}
        CppLibrary.made.add(self)

    def obstacle(self, device: torch.device) -> str | None:
        """Return why the library cannot serve tensors of a device, having compiled it if that was all it took."""
        if device.type != "cpu":
            return "it runs on the CPU; choose another backend, or move the layer"
        return self._found if isinstance(self._found, str) else None

    def call(self, function: str, *arguments: Tensor | int | float | None) -> int:
        """Call a C function with contiguous CPU tensors (pointers), ints (int64_t), floats (double), None (nullptr).

        Returns:
            Its ``int64_t``; of a void function no number that means anything.
        """
        compiled = self._functions.get(function)
        if compiled is None:
            compiled = getattr(self.load(), function)
            # A function's parameters are declared once: ctypes converts plain numbers in a third of the time then.
            compiled.restype, compiled.argtypes = ctypes.c_int64, tuple(map(_c_type, arguments))
            self._functions[function] = compiled
        values: list[Any] = []
        for argument in arguments:  # dozens, in a step of which every microsecond counts
            if isinstance(argument, Tensor):
                if not (argument.is_cpu and argument.is_contiguous()):
                    strides = argument.stride()
                    raise ValueError(f"a C function takes contiguous tensors of the CPU, not strides {strides}")
                pointer = argument.data_ptr()
                if not pointer and argument.numel():
                    raise ValueError(
                        f"a {type(argument).__name__} has no memory of its own to compute with: under FSDP2 a layer's "
                        "parameters are whole within its forward alone; call other methods from there, or name them to "
                        "torch.distributed.fsdp.register_fsdp_forward_method"
                    )
                argument = pointer
            values.append(argument)
        return compiled(*values)

    def has(self, function: str) -> bool:
        """Return whether this processor's build has a function."""
        return hasattr(self.load(), function)

    def load(self) -> ctypes.CDLL:
        """Return the loaded library, compiled unless the cache has it.

        Raises:
            RuntimeError: there is no compiler, or it fails.
        """
        if isinstance(self._found, str):
            raise RuntimeError(self._found)
        return self._found

    @functools.cached_property
    def _found(self) -> ctypes.CDLL | str:
        """The library, or why there is none: what failed once is not tried again at every call."""
        try:
            return _open(self.source, self.flags)
        except RuntimeError as error:
            return str(error)


def compile_all(device: torch.device) -> None:
    """Compile what has been imported and serves a device, so that no compiler runs where time is measured.

    What cannot be compiled is left to whoever asks for it.
    """
    for library in list(CppLibrary.made):
        library.obstacle(device)


def _open(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("there is no C++ compiler; install g++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    texts = [path.read_text("utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
    identity = "\0".join([*texts, *flags, version, processor()])
    name = f"{source.parent.name}-{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    library = cache_folder() / name
    if not os.path.exists(library):  # Path.exists raises where a folder above may not be looked into
        _compile(compiler, source, flags, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise RuntimeError(f"{library} cannot be loaded ({error}); remove it") from error


def _compile(compiler: str, source: Path, flags: tuple[str, ...], library: Path) -> None:
    logger.info("compiling %s", source)
    try:
        library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Built under another name and renamed: another process finds it whole or not at all.
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            part = Path(folder, library.name)
            command = [compiler, *flags, str(source), "-o", str(part)]
            answer = subprocess.run(command, capture_output=True, text=True, check=False)
            if answer.returncode:
                raise RuntimeError(f"{' '.join(command)} fails: {answer.stderr.strip()}")
            part.replace(library)
    except OSError as error:
        raise RuntimeError(f"{library.parent} cannot be written ({error}); set XDG_CACHE_HOME") from error


def cache_folder() -> Path:
    """Return the folder for what was made on this machine and can be made again: ``~/.cache/lvsoftmax``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lvsoftmax"


def processor() -> str:
    """Return what decides the meaning of ``-march=native``: model and instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))


def _c_type(argument: Tensor | int | float | None) -> type:
    if isinstance(argument, float):
        return ctypes.c_double
    return ctypes.c_int64 if isinstance(argument, int) else ctypes.c_void_p
