"""Whether ``torch.compile`` can compile for this machine's CPU, checked before it fails with a long traceback."""

import functools
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

#: The compiler that Inductor runs, unless the environment variable CXX names another.
_COMPILERS = {"darwin": "clang++", "win32": "cl"}
#: What Inductor's code needs besides PyTorch: Python's header, the C++ library and OpenMP.
_PROGRAM = """
#include <Python.h>
#include <omp.h>
#include <vector>
int threads() { return std::vector<int>(1, omp_get_max_threads())[0] + Py_IsInitialized(); }
"""


@functools.cache
def obstacle() -> str | None:
    """Why nothing can be compiled, and what to install, in one line; None if compilation works.

    The first call in a process compiles a small library, which takes a third of a second.
    """
    return _obstacle(os.environ.get("CXX") or _COMPILERS.get(sys.platform, "g++"), sysconfig.get_path("include"))


def _obstacle(compiler: str, headers: str) -> str | None:
    name, *options = shlex.split(compiler)
    if shutil.which(name) is None:
        others = {"darwin": "xcode-select --install", "win32": "Visual Studio's C++ tools"}
        install = others.get(sys.platform, "apt install g++, on Debian and Ubuntu")
        return f"no C++ compiler ({name}); install one: {install}"
    if not (Path(headers) / "Python.h").is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return (
            f"no Python.h in {headers}; install Python's headers: apt install python{version}-dev on Debian and "
            "Ubuntu, python3-devel on Fedora"
        )
    if sys.platform != "linux":
        # Flags differ, and OpenMP comes with PyTorch.
        return None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "trial.cpp"
        source.write_text(_PROGRAM)
        command = [name, *options, "-shared", "-fPIC", "-fopenmp", f"-I{headers}", "trial.cpp", "-o", "trial.so"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=300)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{name} does not run: {error}"
    if done.returncode == 0:
        return None
    said = next((line for line in done.stderr.splitlines() if "error" in line), f"exit status {done.returncode}")
    return f"{name} cannot compile a small library: {said.strip()}"
