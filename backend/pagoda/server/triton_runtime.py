"""Triton on this machine: found in the official container or in the `nvidia-pytriton` wheel, laid out to start.

The wheel holds the real server and one python stub for each Python version. What the stub needs of its surroundings:
the first `python3` on PATH decides its prefix (PYTHONPATH is ignored), and its working directory comes first in
`sys.path`, so it must not be a folder with packages in it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from pagoda.errors import ConfigError

CONTAINER = Path("/opt/tritonserver")


@dataclass(frozen=True, slots=True)
class TritonRuntime:
    """What it takes to start a server: program, backend directory, environment."""

    binary: Path
    backends: Path
    environment: dict[str, str]


def assemble(folder: Path) -> TritonRuntime:
    """Lay out the backend directory in `folder`. Raises ConfigError when there is no Triton on this machine."""
    if (CONTAINER / "bin" / "tritonserver").exists():
        return _container()
    backends = folder / "backends"
    backends.mkdir(parents=True)
    _install_backend(backends / "pagoda")
    wheel = _wheel_folder()
    _install_python_backend(wheel, backends / "python")
    return TritonRuntime(
        wheel / "bin" / "tritonserver", backends, _environment(wheel.parents[1] / "nvidia_pytriton.libs")
    )


def _container() -> TritonRuntime:
    if not (CONTAINER / "backends" / "pagoda" / "model.py").exists():
        raise ConfigError(
            f"{CONTAINER}/backends/pagoda/model.py is missing: build the image from Pagoda's Dockerfile, "
            "or copy backend/model.py there"
        )
    return TritonRuntime(CONTAINER / "bin" / "tritonserver", CONTAINER / "backends", _environment(None))


def _install_backend(folder: Path) -> None:
    spec = importlib.util.find_spec("pagoda_backend")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder.mkdir()
    shutil.copy(Path(next(iter(spec.submodule_search_locations))) / "model.py", folder / "model.py")


def _wheel_folder() -> Path:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "no Triton Inference Server on this machine: run in its official container, "
            "or install the wheel with `pip install --no-deps nvidia-pytriton==0.7.0`"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "tritonserver"


def _install_python_backend(wheel: Path, folder: Path) -> None:
    folder.mkdir()
    for file in (wheel / "backends" / "python").iterdir():
        if file.is_file():
            shutil.copy(file, folder / file.name)  # Triton refuses a link that leads out of its backend directory
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = wheel / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise ConfigError(f"the nvidia-pytriton wheel holds no stub for Python {version}: use Python 3.10 to 3.12")
    _check_numpy()
    shutil.copy(stub, folder / stub.name)
    (folder / stub.name).chmod(0o755)


def _check_numpy() -> None:
    import numpy

    if int(numpy.__version__.partition(".")[0]) >= 2:
        raise ConfigError(
            f"the nvidia-pytriton wheel's stub cannot read arrays of NumPy {numpy.__version__}: "
            "run `pip install 'numpy<2'` in this environment"
        )


def _environment(libraries: Path | None) -> dict[str, str]:
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)  # the stub ignores it; its children must not differ from it
    environment["PATH"] = f"{Path(sys.prefix) / 'bin'}:{environment.get('PATH', '')}"
    paths = [str(libraries)] if libraries else []
    if libraries and (shared := _libpython_folder()):
        paths.append(shared)
    paths.append(environment.get("LD_LIBRARY_PATH", ""))
    environment["LD_LIBRARY_PATH"] = ":".join(p for p in paths if p)
    return environment


def _libpython_folder() -> str | None:
    """Where this Python's shared library lies, for the stub, which links to it."""
    import sysconfig

    folder, name = sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME")
    return folder if folder and name and (Path(folder) / name).exists() else None
