"""The kernels are plain C without Python's API: one library, and so one wheel, serves every version of Python."""

from importlib.machinery import EXTENSION_SUFFIXES

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class Library(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + EXTENSION_SUFFIXES[-1]


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_ext": Library, "bdist_wheel": Wheel})
