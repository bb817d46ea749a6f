"""Wheels for the tests of environments: nothing is downloaded for them."""

from __future__ import annotations

import zipfile
from pathlib import Path


def wheel(folder: Path, name: str = "tinyprobe", value: int = 1, version: str = "1.0") -> str:
    """Write a wheel of one module, the minimum that uv accepts; return its file name."""
    file = f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / file, "w") as zipped:
        zipped.writestr(f"{name}.py", f"VALUE = {value}\n")
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        zipped.writestr(f"{info}/METADATA", metadata)
        zipped.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        zipped.writestr(f"{info}/RECORD", "")
    return file
