"""A conda-packages.txt as far as uv goes: its lines for python and pip. Any other line is a mistake in words.
Called by `requirements`.

A line is as `conda list --export` writes it, or as people do: [channel::]package[version][=build].
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
_SHOWN = 60
_MAX_TOLD = 10

# What PyPI calls otherwise.
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
class Found:
    """The versions that the lines ask for: None without a line, "" for any version, 3.11 for every 3.11, else a
    specifier of PEP 440."""

    python: str | None
    pip: str | None
    mistakes: list[str]


def read(text: str, file: str) -> Found:
    """What a conda-packages.txt asks for, and its mistakes, each with its line. Its name may be another one."""
    if file.endswith((".yml", ".yaml")):
        instead = "write its python and pip as lines of a conda-packages.txt, the rest into requirements.txt"
        return Found(None, None, [f"{file}: a YAML file of conda is not read; {instead}"])
    found: dict[str, str] = {}
    mistakes: list[str] = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.partition("#")[0].strip()
        for told in _take(line, found) if line else ():
            mistakes.append(f"{file}:{number}: {line[:_SHOWN]}: {told}")
    if len(mistakes) > _MAX_TOLD:
        more = len(mistakes) - _MAX_TOLD
        mistakes[_MAX_TOLD:] = [f"{file}: {more} more lines are no requirements of python or pip"]
    return Found(found.get("python"), found.get("pip"), mistakes)


def _take(line: str, found: dict[str, str]) -> Iterator[str]:
    """Take in one line, or tell what is wrong with it."""
    matched = _LINE.fullmatch(line)
    if matched is None:
        yield "cannot be read; allowed: a line such as python=3.11"
        return
    name = matched["name"].lower()
    if name not in {"python", "pip"}:
        yield _refusal(name)
        return
    version = _version(matched["rest"].strip())
    if version is None:
        example = "3.11" if name == "python" else "24"
        yield (
            f"no version of {name} that can be read; allowed: {name}={example}, "
            f"or a range such as {name}>={example}"
        )
    elif found.get(name, version) != version:
        yield f"{name} is given twice"
    else:
        found[name] = version


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


def _clause(operator: str, number: str, any_below: str) -> str:
    """A clause of conda as a clause of PEP 440: `=3.11` and `==3.11` mean all of 3.11, and `>=3.9.*` means `>=3.9`."""
    if operator in {"=", "=="}:
        return f"=={number}.*"
    return f"{operator}{number}{any_below if operator == '!=' else ''}"


def _refusal(name: str) -> str:
    words = "conda packages are not installed"
    if name in _ON_PYPI:
        return f"{words}; put {_ON_PYPI[name]} into requirements.txt, which is its name on PyPI"
    if _CUDA.fullmatch(name):
        return (
            f"{words}, and PyPI has none of this name; wheels such as torch and tensorflow[and-cuda] bring "
            "their own CUDA libraries: remove the line"
        )
    if _NOT_ON_PYPI.fullmatch(name):
        return (
            f"{words}, and PyPI has none of this name; remove the line where a wheel brings what it needs, "
            "or install it on the machine"
        )
    return f"{words}; if PyPI has {name}, put it into requirements.txt"
