"""Drives CMake: configures and builds the op library of CMakeLists.txt and puts it into the package.

WIDENET_NATIVE=ON|OFF (with the library or without), WIDENET_CUDA=AUTO|ON|OFF (with the CUDA kernels in it: where an
nvcc is found, or in any case, or in none) and CUDAARCHS (their architectures) are all that the environment decides.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import zlib

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).parent.resolve()
OLDEST_NVCC = (12, 8)  # that knows sm_100 and sm_120


def setting(name: str, *values: str) -> str:
    """Of the environment; the first value is the default."""
    value = (os.environ.get(name) or values[0]).upper()
    if value not in values:
        raise SystemExit(f"{name}: expected {', '.join(values)}, got {value!r}")
    return value


NATIVE = setting("WIDENET_NATIVE", "ON", "OFF")
CUDA = setting("WIDENET_CUDA", "AUTO", "ON", "OFF")


def nvcc_wheels() -> list[str]:
    lines = (ROOT / "requirements-nvcc.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def tools_path() -> str:
    """What pip put beside this Python is found even where its environment is not activated."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def find_nvcc() -> tuple[str, str] | None:
    """Its path and version: in CUDA_HOME, on PATH, or from the compiler's wheels where Python finds its packages."""
    wheels = [bin for place in sys.path for bin in sorted(pathlib.Path(place).glob("nvidia/cu*/bin"), reverse=True)]
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin" if home else "", tools_path(), *map(str, wheels)]
    for nvcc in filter(None, (shutil.which("nvcc", path=place) for place in places if place)):
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        version = re.search(r"release (\d+)\.(\d+), V([\d.]+)", text)
        if version and tuple(map(int, version.group(1, 2))) >= OLDEST_NVCC:
            return nvcc, version[3]
        print(f"widenet_kernels: {nvcc} is not of CUDA {'.'.join(map(str, OLDEST_NVCC))} or later and left aside")
    return None


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import torch

        cmake, ninja = (shutil.which(tool, path=tools_path()) for tool in ("cmake", "ninja"))
        if not cmake or not ninja:
            raise SystemExit("widenet_kernels: building the kernels needs cmake and ninja: pip install cmake ninja")
        nvcc, version = self.chosen_nvcc()
        settings = {
            "TORCH_DIR": torch.__path__[0],
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": pathlib.Path(self.get_ext_fullpath(ext.name)).resolve().parent,
            "CMAKE_MAKE_PROGRAM": ninja,  # an earlier build's may be gone with its environment
            "WIDENET_CUDA": "ON" if nvcc else "OFF",
        }
        environment = dict(os.environ)
        if nvcc:
            settings["CMAKE_CUDA_COMPILER"] = nvcc
            # the compiler's wheels have their libraries in lib, where their nvcc does not look
            places = [str(pathlib.Path(nvcc).parents[1] / "lib"), os.environ.get("LIBRARY_PATH", "")]
            environment["LIBRARY_PATH"] = os.pathsep.join(filter(None, places))
        # kept, one for each compiler: what has not changed is not compiled again
        build = ROOT / "build" / f"ops-{zlib.crc32(f'{nvcc} {version}'.encode()):08x}"
        definitions = ["-UCMAKE_CUDA_ARCHITECTURES"]  # CUDAARCHS decides every time anew
        definitions += [f"-D{name}={value}" for name, value in settings.items()]
        for command in ([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *definitions], [cmake, "--build", build]):
            subprocess.run(command, env=environment, check=True)

    @staticmethod
    def chosen_nvcc() -> tuple[str, str]:
        """Path and version, both empty for none."""
        found = None if CUDA == "OFF" else find_nvcc()
        if CUDA == "ON" and found is None:
            raise SystemExit(
                "widenet_kernels: WIDENET_CUDA=ON needs an nvcc of CUDA 12.8 or later: install the CUDA toolkit and "
                f"set CUDA_HOME, or pip install {' '.join(nvcc_wheels())}"
            )
        print(f"widenet_kernels: CUDA kernels: {'by {}, {}'.format(*found) if found else 'none'}")
        return found or ("", "")

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # no Python in it, so no Python version in its name


class WithCommit(build_py):
    """What is installed has no .git beside it: what it measures names its commit by this file."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            place = pathlib.Path(self.build_lib, "widenet_kernels", "benchmarks", "COMMIT")
            place.write_text(self.commit() + "\n")

    @staticmethod
    def commit() -> str:
        """Of this checkout; empty where it is none."""
        command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
        if not (ROOT / ".git").exists() or not shutil.which("git"):
            return ""
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    packages=[*find_packages(include=["widenet_kernels*"]), "widenet_kernels.benchmarks"],  # whose folder stands beside
    ext_modules=[Extension("widenet_kernels._C", [])] if NATIVE == "ON" else [],
    cmdclass={"build_ext": CMakeBuild, "build_py": WithCommit, "bdist_wheel": PlatformWheel},
    # asked for by name and not there: with build isolation pip fetches the compiler for this build alone
    setup_requires=nvcc_wheels() if (NATIVE, CUDA) == ("ON", "ON") and find_nvcc() is None else [],
)
