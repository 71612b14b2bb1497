"""Compiles a CUDA source at first use and keeps the shared library in the user's cache.

The key of a library is its source, its macros, the compiler's flags and version, the version of
the headers and the architecture; a changed one is a new file. Libraries have a plain C interface
and are loaded with :mod:`ctypes`, so neither torch's headers nor its C++ ABI are involved.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ctconvert.errors import CtconvertError

_DEFAULT_CUDA = Path("/usr/local/cuda")
_FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-w", "-Xcompiler=-fPIC")


class KernelUnavailableError(CtconvertError, RuntimeError):
    """A kernel cannot be built or run on this machine; the message says what to do."""

    kind = "KernelUnavailable"


def find_nvcc() -> Path:
    """The nvcc of ``CUDA_HOME``, else of ``PATH``, else of ``/usr/local/cuda``.

    Raises:
        KernelUnavailableError: there is none.
    """
    home = os.environ.get("CUDA_HOME")
    candidates = [str(Path(home) / "bin" / "nvcc")] if home else []
    candidates += ["nvcc", str(_DEFAULT_CUDA / "bin" / "nvcc")]
    for candidate in candidates:
        found = shutil.which(candidate)
        if found:
            return Path(found)
    raise KernelUnavailableError(
        "nvcc was not found: install the CUDA toolkit (12.2 or newer) and put nvcc on PATH or set "
        "CUDA_HOME; the reference runs with device cpu"
    )


def cutlass_include() -> tuple[Path, str]:
    """CUTLASS's include folder in the installed package ``nvidia-cutlass``, and its version.

    Raises:
        KernelUnavailableError: the package is missing or holds no headers.
    """
    spec = importlib.util.find_spec("cutlass_library")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        include = Path(location) / "source" / "include"
        header = include / "cutlass" / "version.h"
        if header.is_file():
            found = re.findall(r"#define CUTLASS_(?:MAJOR|MINOR|PATCH)\s+(\d+)", header.read_text())
            return include, ".".join(found)
    raise KernelUnavailableError(
        "CUTLASS's headers were not found: pip install 'ctconvert[cutlass]' (the package "
        "nvidia-cutlass); the reference runs with device cpu"
    )


def cache_dir() -> Path:
    """Where libraries are kept: ``$XDG_CACHE_HOME/ctconvert`` or ``~/.cache/ctconvert``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ctconvert"


def build(
    name: str,
    source: Path,
    units: Sequence[Mapping[str, str]],
    include: Path,
    include_version: str,
    arch: str,
) -> ctypes.CDLL:
    """Compiles ``source`` once for each of ``units`` and links the objects to one library.

    The objects are compiled in parallel. A library already in the cache is loaded as it is. Two
    processes that want one library wait for one another.

    Args:
        name: first part of the file's name and what the progress line says.
        source: the ``.cu`` file.
        units: for each object file, its macros and their values.
        include: folder of the headers.
        include_version: version of the headers.
        arch: architecture, as in ``"90a"``.

    Raises:
        KernelUnavailableError: there is no nvcc, or it fails.
        OSError: the cache cannot be written.
    """
    nvcc = find_nvcc()
    flags = [*_FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    key = hashlib.sha256()
    for part in (source.read_text(), repr([sorted(u.items()) for u in units]), repr(flags)):
        key.update(part.encode())
    key.update(f"{include_version}\n{_run([nvcc, '--version'], name)}".encode())
    folder = cache_dir()
    library = folder / f"{name}-sm{arch}-{key.hexdigest()[:16]}.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.is_file():
                command = [str(nvcc), *flags, f"-I{include}"]
                _compile(name, command, source, units, library)
    return ctypes.CDLL(str(library))


def _compile(
    name: str,
    command: Sequence[str | Path],
    source: Path,
    units: Sequence[Mapping[str, str]],
    library: Path,
) -> None:
    start = time.monotonic()
    workers = min(len(units), os.cpu_count() or 1)
    minutes = -(-len(units) // workers)
    print(
        f"ctconvert: compiling {name} ({len(units)} kernels, {workers} at a time), about "
        f"{minutes} minute{'s' * (minutes > 1)}, once; kept in {library.parent}",
        file=sys.stderr,
        flush=True,
    )
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=f".{name}-") as tmp:

        def one(index: int) -> str:
            output = str(Path(tmp) / f"{index}.o")
            macros = [f"-D{macro}={value}" for macro, value in units[index].items()]
            _run([*command, *macros, "-c", source, "-o", output], name)
            return output

        with ThreadPoolExecutor(workers) as pool:
            objects = list(pool.map(one, range(len(units))))
        linked = Path(tmp) / library.name
        _run([*command, "-shared", *objects, "-o", linked], name)
        linked.replace(library)
    print(f"ctconvert: {name} took {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def _run(command: Sequence[str | Path], name: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise KernelUnavailableError(f"{command[0]} cannot be run: {error}") from error
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if "error" in line.lower()]
        reason = (lines or result.stderr.splitlines() or [f"exit code {result.returncode}"])[0]
        raise KernelUnavailableError(
            f"{command[0]} could not build {name}: {reason.strip()[:300]}; CUDA 12.2 or newer and "
            "a C++17 host compiler are needed; the reference runs with device cpu"
        )
    return result.stdout
