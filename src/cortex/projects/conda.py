"""Reads the part of a conda-packages.txt that uv can satisfy: the lines for python and pip. Any
other line is an error with advice. Called by `requirements`.

A line has the format of `conda list --export`, or one written by hand:
[channel::]package[version][=build].
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_LINE = re.compile(r"(?:\S*::)?(?P<name>\w[\w.-]*)\s*(?P<rest>.*)", re.ASCII)
_NUMBER = r"\d{1,9}(?:\.\d{1,9}){0,3}"
_PREFIX = re.compile(rf"(?:==?)?\s*({_NUMBER})(?:\.?\*)?(?:\s*=\s*[\w.*]+|\s+[\w.*]+)?", re.ASCII)
_CLAUSE = re.compile(rf"\s*(>=|<=|!=|~=|==|[=<>])\s*({_NUMBER})(\.\*)?\s*", re.ASCII)
_BRACKETS = re.compile(r"\[version=(['\"]?)(?P<version>[^'\"\]]*)\1\]")
_MAX_SHOWN = 60
_MAX_REPORTED = 10

# Packages with another name on PyPI.
_ON_PYPI = {
    "faiss": "faiss-cpu",
    "matplotlib-base": "matplotlib",
    "msgpack-python": "msgpack",
    "opencv": "opencv-python-headless",
    "py-opencv": "opencv-python-headless",
    "pytables": "tables",
    "pytorch": "torch",
    "pytorch-gpu": "torch",
    "tensorflow-gpu": "tensorflow",
    "typing_extensions": "typing-extensions",
}
_CUDA = re.compile(r"cuda\w*(-.*)?|cudnn|nccl|pytorch-cuda|libcu.*", re.ASCII)
_NOT_ON_PYPI = re.compile(
    r"_.*|lib.*|.*_(linux|osx|win)-\w+|gcc|gxx|gfortran|clang\w*|openssl|ca-certificates|bzip2|xz|zlib|zstd"
    r"|ncurses|readline|sqlite|tk|tzdata|openjdk|r-.*|ld_impl.*|blas|openblas|mkl|gdal|hdf5|geos|ffmpeg"
    r"|imagemagick|nodejs|perl|ruby|make|git",
    re.ASCII,
)


@dataclass(frozen=True)
class CondaPackages:
    """The versions that the lines request: None without a line, "" for any version, 3.11 for every
    3.11, else a specifier of PEP 440."""

    python: str | None
    pip: str | None
    errors: list[str]


def read_packages(text: str, file: str) -> CondaPackages:
    """The versions that a conda-packages.txt requests, and its errors, each with its line.

    Args:
        file: its name in the project, for messages.
    """
    if file.endswith((".yml", ".yaml")):
        advice = (
            "write its python and pip as lines of a conda-packages.txt, the rest into "
            "requirements.txt"
        )
        return CondaPackages(None, None, [f"{file}: a YAML file of conda is not read; {advice}"])
    versions: dict[str, str] = {}
    errors: list[str] = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.partition("#")[0].strip()
        for message in _parse_line(line, versions) if line else ():
            errors.append(f"{file}:{number}: {line[:_MAX_SHOWN]}: {message}")
    if len(errors) > _MAX_REPORTED:
        more = len(errors) - _MAX_REPORTED
        errors[_MAX_REPORTED:] = [f"{file}: {more} more lines request neither python nor pip"]
    return CondaPackages(versions.get("python"), versions.get("pip"), errors)


def _parse_line(line: str, versions: dict[str, str]) -> Iterator[str]:
    """Add the version of one line to `versions`, or yield the line's error."""
    matched = _LINE.fullmatch(line)
    if matched is None:
        yield "cannot be read; allowed: a line such as python=3.11"
        return
    name = matched["name"].lower()
    if name not in {"python", "pip"}:
        yield _advice(name)
        return
    version = _version(matched["rest"].strip())
    if version is None:
        example = "3.11" if name == "python" else "24"
        yield (
            f"the version of {name} cannot be read; allowed: {name}={example}, "
            f"or a range such as {name}>={example}"
        )
    elif versions.get(name, version) != version:
        yield f"{name} is given twice, with different versions; remove one line"
    else:
        versions[name] = version


def _version(rest: str) -> str | None:
    bracketed = _BRACKETS.fullmatch(rest)
    rest = bracketed["version"] if bracketed else rest
    if rest in {"", "*", "=*", "==*"}:
        return ""
    prefix = _PREFIX.fullmatch(rest)
    if prefix is not None:
        return prefix[1]
    clauses = [_CLAUSE.fullmatch(clause) for clause in rest.split(",")]
    if not all(clauses):
        return None
    return ",".join(_clause(each[1], each[2], each[3] or "") for each in clauses if each)


def _clause(operator: str, number: str, wildcard: str) -> str:
    """A clause of conda as a clause of PEP 440: `=3.11` and `==3.11` mean every 3.11, and `>=3.9.*`
    means `>=3.9`.

    Args:
        wildcard: ".*" or "".
    """
    if operator in {"=", "=="}:
        return f"=={number}.*"
    return f"{operator}{number}{wildcard if operator == '!=' else ''}"


def _advice(name: str) -> str:
    """The error of a line that requests another package, and what to do about it."""
    problem = "conda packages are not installed"
    if name in _ON_PYPI:
        return f"{problem}; put {_ON_PYPI[name]} into requirements.txt, which is its name on PyPI"
    if _CUDA.fullmatch(name):
        return (
            f"{problem}, and PyPI has no package of this name; remove the line: wheels such as "
            "torch and tensorflow[and-cuda] contain their own CUDA libraries"
        )
    if _NOT_ON_PYPI.fullmatch(name):
        return (
            f"{problem}, and PyPI has no package of this name; remove the line if a wheel contains "
            "the package, or install it on the machine"
        )
    return f"{problem}; if PyPI has {name}, put it into requirements.txt"
