"""Backends: what is named runs or raises, ``auto`` is the first that can; C++ is compiled once, when it is called."""

import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from lvsoftmax.ops import backends
from lvsoftmax.ops.backends import Backends, BackendUnavailable, CppLibrary, compile_all

SOURCE = """
#include <cstdint>
extern "C" void scale(const float* x, float* y, int64_t size, double factor, const float* missing) {
    for (int64_t i = 0; i < size; i++) y[i] = missing ? 0 : float(factor) * x[i];
}
"""

SOURCES = sorted(Path(backends.__file__).parent.rglob("*.cpp"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lvsoftmax"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "kernel.cpp"
    path.write_text(SOURCE)
    return path


def only_on(kind):
    return lambda device: None if device.type == kind else f"needs {kind}; move there"


TABLE = Backends(gpu=only_on("cuda"), native=only_on("cpu"), broken=lambda device: "no compiler; install one")


@pytest.mark.parametrize(
    ("name", "device", "chosen"),
    [
        ("auto", "cuda", "gpu"),
        ("auto", "cpu", "native"),
        ("auto", "meta", "eager"),
        ("native", "cpu", "native"),
        ("eager", "cuda", "eager"),
    ],
)
def test_the_first_that_can_run_or_the_one_named(name, device, chosen):
    assert TABLE.choose(name, device) == chosen
    assert TABLE.choose(name, torch.device(device)) == chosen


def test_what_is_named_is_never_replaced():
    with pytest.raises(BackendUnavailable, match=r"^backend='gpu' cannot run on cpu: needs cuda; move there$"):
        TABLE.choose("gpu", "cpu")
    with pytest.raises(ValueError, match=r"^backend='fast': choose one of auto, gpu, native, broken, eager$"):
        TABLE.choose("fast", "cpu")


def test_a_constructor_refuses_what_can_run_nowhere():
    for name in ("auto", "gpu", "native", "eager"):
        TABLE.check(name)
    with pytest.raises(BackendUnavailable, match=r"^backend='broken' cannot run here: no compiler; install one$"):
        TABLE.check("broken")
    with pytest.raises(ValueError, match="choose one of"):
        TABLE.check("fast")


def test_a_choice_is_a_constant_to_the_compiler():
    def sign(x):
        return -x if TABLE.choose("auto", x.device.type) == "native" else x

    assert torch.compile(sign, backend="aot_eager", fullgraph=True)(torch.ones(())) == -1


def test_a_library_is_compiled_when_first_called(source, cache):
    library = CppLibrary(source)
    assert not cache.exists()
    x, y = torch.arange(4.0), torch.empty(4)
    library.call("scale", x, y, 4, 2.5, None)
    assert torch.equal(y, 2.5 * x)
    (file,) = cache.iterdir()
    before = file.stat().st_mtime_ns
    CppLibrary(source).load()
    assert [file.stat().st_mtime_ns for file in cache.iterdir()] == [before]


def test_every_library_that_there_is_can_be_compiled_at_once(source, cache, monkeypatch):
    monkeypatch.setattr(CppLibrary, "made", weakref.WeakSet())
    library, broken = CppLibrary(source), CppLibrary(source.with_name("broken.cpp"))
    broken.source.write_text("int f( {")
    compile_all(torch.device("cuda"))
    assert not cache.exists()
    compile_all(torch.device("cpu"))
    assert [file.suffix for file in cache.iterdir()] == [".so"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert library.obstacle(torch.device("cpu")) is None
    assert "broken.cpp" in broken.obstacle(torch.device("cpu"))


@pytest.mark.parametrize("change", ["source", "header", "flags", "processor"])
def test_a_change_of_what_the_code_follows_from_compiles_anew(source, cache, monkeypatch, change):
    CppLibrary(source).load()
    if change == "source":
        source.write_text(SOURCE + "\n")
    if change == "header":
        source.with_name("included.h").write_text("// anything")
    if change == "processor":
        monkeypatch.setattr(backends, "processor", lambda: "another")
    CppLibrary(source, *(["-DSOMETHING"] if change == "flags" else [])).load()
    assert len(list(cache.iterdir())) == 2


def test_processes_that_compile_at_once_both_get_a_whole_library(source, cache):
    code = (
        f"import torch; from pathlib import Path; from lvsoftmax.ops.backends import CppLibrary; y = torch.empty(1);"
        f"CppLibrary(Path({str(source)!r})).call('scale', torch.ones(1), y, 1, 3.0, None); assert y == 3"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(list(cache.iterdir())) == 1


def test_what_stands_in_the_way_is_named(source, cache, monkeypatch):
    library = CppLibrary(source)
    assert library.obstacle(torch.device("cpu")) is None
    assert "runs on the CPU" in library.obstacle(torch.device("cuda"))
    broken = source.with_name("broken.cpp")
    broken.write_text("int f( {")
    assert "broken.cpp" in CppLibrary(broken).obstacle(torch.device("cpu"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert CppLibrary(source).obstacle(torch.device("cpu")) == "there is no C++ compiler; install g++"


def test_what_cannot_be_compiled_is_not_tried_again_at_every_call(source, cache, monkeypatch):
    source.write_text("int f( {")
    run, calls = subprocess.run, []
    monkeypatch.setattr(backends.subprocess, "run", lambda *words, **options: calls.append(1) or run(*words, **options))
    library = CppLibrary(source)
    told = {library.obstacle(torch.device("cpu")) for _ in range(3)}
    assert len(told) == 1 and len(calls) == 2  # its version, and once the source
    with pytest.raises(RuntimeError, match="fails"):
        library.load()
    assert len(calls) == 2


def test_for_another_device_nothing_is_compiled(source, cache):
    assert "runs on the CPU" in CppLibrary(source).obstacle(torch.device("cuda"))
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_named(source, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "set XDG_CACHE_HOME" in CppLibrary(source).obstacle(torch.device("cpu"))


def test_a_cache_that_may_not_be_looked_into_is_named(source, cache, monkeypatch):
    """As the home folder of another user."""
    stat, mkdir = os.stat, Path.mkdir

    def refuse(path, *args, **options):
        if str(path).startswith(str(cache)):
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", lambda path, *args, **options: refuse(path) or stat(path, *args, **options))
    monkeypatch.setattr(Path, "mkdir", lambda path, *args, **options: refuse(path) or mkdir(path, *args, **options))
    assert "set XDG_CACHE_HOME" in CppLibrary(source).obstacle(torch.device("cpu"))


def test_only_contiguous_tensors_of_the_cpu_become_pointers(source, cache):
    y = torch.empty(4)
    for x in (torch.ones(8)[::2], torch.ones(4, device="meta")):
        with pytest.raises(ValueError, match="contiguous tensors of the CPU"):
            CppLibrary(source).call("scale", x, y, 4, 1.0, None)


class Sharded(torch.Tensor):
    """A tensor whose memory is somewhere else, as a DTensor's is."""

    @staticmethod
    def __new__(cls, whole: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=whole.dtype, device=whole.device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_tensor_without_memory_is_refused(source, cache):
    """Its pointer is null: the function would read there. An empty tensor's may be."""
    library, x = CppLibrary(source), torch.ones(4)
    with pytest.raises(ValueError, match="a Sharded has no memory of its own.*register_fsdp_forward_method"):
        library.call("scale", Sharded(x), x, 4, 1.0, None)
    library.call("scale", torch.ones(0), torch.ones(0), 0, 1.0, None)


def test_triton_says_what_it_needs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = backends.triton(torch.device("cpu"))
    assert "pip install triton" in reason or "CUDA device" in reason


def test_triton_is_for_cuda_devices(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backends.triton(torch.device("cuda")) is None
    assert "move the layer" in backends.triton(torch.device("cpu"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_source_compiles_where_there_is_a_compiler(path):
    """Otherwise the laws of its backend would be skipped in silence."""
    CppLibrary(path).load()


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_library_allocates_memory(path):
    """It could not say that there is none: what it needs comes as a tensor."""
    symbols = Path(CppLibrary(path).load()._name).read_bytes().split(b"\0")
    assert not {b"malloc", b"calloc", b"realloc", b"_Znwm", b"_Znam"} & set(symbols)
