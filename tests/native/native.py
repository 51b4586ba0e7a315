"""Builds the NumPy module of the raw CPU kernels with CMake, and calls it with tensors."""

import fcntl
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
from types import ModuleType
from typing import Any

import numpy as np
import pybind11
import torch

ROOT = pathlib.Path(__file__).parents[2]
LEVELS = ("baseline", "avx2", "avx512")
GEMM_LEVELS = (*LEVELS, "avx512_bf16")  # for which the other kernels are those of avx512
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def build(sanitize: bool) -> pathlib.Path:
    """Configures and builds below build/, which keeps what has not changed; returns the module's path."""
    directory = ROOT / "build" / ("native-sanitized" if sanitize else "native")
    tools = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    ninja = shutil.which("ninja", path=tools)
    settings = {
        "WIDENET_OPS": "OFF",
        "WIDENET_TESTING": "ON",
        "WIDENET_SANITIZE": "ON" if sanitize else "OFF",
        "TORCH_DIR": "" if sanitize else torch.__path__[0],  # without the sanitizers the emulated ops as well
        "CMAKE_CXX_COMPILER": "g++",  # whose sanitizer runtimes test_sanitizers.py asks for
        "CMAKE_MAKE_PROGRAM": ninja,  # an earlier build's may be gone with its environment
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "Python_EXECUTABLE": sys.executable,
    }
    assert ninja, "the native tests need ninja: pip install widenet-kernels[test]"
    assert shutil.which("g++", path=tools), "the native tests need g++"
    configure = ["cmake", "-S", ROOT, "-B", directory, "-G", "Ninja", *(f"-D{k}={v}" for k, v in settings.items())]
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes that test side by side build one after the other
        for command in (configure, ["cmake", "--build", directory]):
            done = subprocess.run(command, env={**os.environ, "PATH": tools}, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return directory / f"_numpy_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"


def load(path: pathlib.Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_numpy_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def to_numpy(value: Any) -> Any:
    """A tensor as an array on the same memory; bfloat16 as uint16, which is how the module takes it."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.view(torch.int16).numpy().view(np.uint16) if value.dtype == torch.bfloat16 else value.numpy()


def to_torch(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(to_torch(v) for v in value)
    if value is None:
        return None
    if value.dtype == np.uint16:
        return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(value)


class Kernels:
    """The kernels of one level as functions on tensors."""

    def __init__(self, module: ModuleType, level: str) -> None:
        self.module, self.level = module, level

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.module, name)

        def call(*arguments: Any, **named: Any) -> Any:
            named = {key: to_numpy(value) for key, value in named.items()}
            return to_torch(function(*map(to_numpy, arguments), **named, level=self.level))

        return call


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
