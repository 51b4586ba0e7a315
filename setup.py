"""Drives CMake: configures and builds the op library of CMakeLists.txt and puts it into the package."""

import os
import pathlib
import shutil
import subprocess
import sysconfig

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent.resolve()
NATIVE = os.environ.get("WIDENET_NATIVE", "ON").upper()
if NATIVE not in ("ON", "OFF"):
    raise SystemExit(f"WIDENET_NATIVE: expected ON or OFF, got {NATIVE!r}")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import torch

        # tools that pip put beside this Python are found even where its environment is not activated
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
        cmake, ninja = (shutil.which(tool, path=path) for tool in ("cmake", "ninja"))
        if not cmake or not ninja:
            raise SystemExit("widenet_kernels: building the kernels needs cmake and ninja: pip install cmake ninja")
        build = pathlib.Path(self.build_temp).resolve()
        settings = {
            "TORCH_DIR": torch.__path__[0],
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": pathlib.Path(self.get_ext_fullpath(ext.name)).resolve().parent,
            "CMAKE_MAKE_PROGRAM": ninja,  # an earlier build's may be gone with its environment
        }
        definitions = [f"-D{name}={value}" for name, value in settings.items()]
        subprocess.run([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *definitions], check=True)
        subprocess.run([cmake, "--build", build], check=True)

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # no Python in it, so no Python version in its name


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension("widenet_kernels._C", [])] if NATIVE == "ON" else [],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
