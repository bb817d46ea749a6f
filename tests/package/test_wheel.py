"""The wheel contains what users of the package need, its license included."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_wheel_contains_the_license_and_both_packages(tmp_path: Path) -> None:
    uv = str(Path(sys.executable).with_name("uv"))
    subprocess.run(
        [uv, "build", "--quiet", "--wheel", "--out-dir", str(tmp_path), str(ROOT)],
        check=True,
        timeout=300,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (license_file,) = [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        assert archive.read(license_file) == (ROOT / "LICENSE").read_bytes()
        lines = archive.read(metadata).decode().splitlines()
    assert "License-Expression: Apache-2.0" in lines
    assert "License-File: LICENSE" in lines
    assert {"cortex/py.typed", "cortex/__init__.py"} <= set(names)
    assert any(name.startswith("cortex_internal/") for name in names)
