"""Runs tests in an emulated Debian 12, with its own kernel, systemd, and only cgroup v2.

    python tests/vm/vm.py [PYTEST ARGUMENTS]

Most machines that run operators are like that, and the machines that test a change are not. Without
arguments it runs the tests that depend on control groups, limits, users and processes. It needs
root, since debootstrap makes the system. Only the first run needs a Debian mirror: `.vm` stores the
system.

The machine has two disks. One has the system, and no run changes it. The other has this tree, its
virtual environment and that environment's Python, below the same paths as here.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TREE = Path(__file__).resolve().parents[2]
CACHE = TREE / ".vm"
SUITE = "bookworm"
# The programs that tests call, and the libraries of a Python that is not Debian's own.
PACKAGES = [
    "systemd", "systemd-sysv", "udev", "dbus", "linux-image-cloud-amd64", "initramfs-tools",
    "python3", "curl", "openssl", "procps", "strace", "iproute2", "ca-certificates",
    "libssl3", "libffi8", "libsqlite3-0", "libbz2-1.0", "liblzma5", "libreadline8",
    "libncursesw6", "faketime",
]  # fmt: skip
SYSTEM_SIZE = "3G"
EXCLUDED = {".git", ".vm"}
MEMORY, CPUS = "4G", "2"
TIMEOUT_S = 3600
RESULT = "exit status of the tests: "
SERVICE = """\
[Unit]
Description=The tests
After=multi-user.target

[Service]
Type=oneshot
ExecStart=/bin/sh /tree/run
Delegate=yes
TimeoutStartSec=infinity
StandardOutput=file:/dev/ttyS1
StandardError=file:/dev/ttyS1
ExecStopPost=/bin/systemctl --no-block poweroff

[Install]
WantedBy=default.target
"""


def main(arguments: list[str]) -> int:
    """Run the tests in the machine, and return their exit status."""
    if os.geteuid() != 0:
        sys.exit("tests/vm/vm.py: needs root, for debootstrap; run it with sudo")
    CACHE.mkdir(exist_ok=True)
    system = _system()
    with _disk_of_tree(arguments) as disk:
        return _run(system, disk)


def _system() -> Path:
    """The disk of the system; its kernel is beside it."""
    disk = CACHE / "system.img"
    if disk.exists():
        return disk
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        root, part = Path(folder) / "root", Path(folder) / "system.img"
        command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}"]
        _checked(*command, SUITE, str(root), _mirror())
        (root / "etc/fstab").write_text("/dev/vdb /tree ext4 defaults 0 0\n")
        (root / "tree").mkdir()
        (root / "etc/hostname").write_text("cortex-vm\n")
        (root / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n127.0.1.1 cortex-vm\n")
        (root / "etc/systemd/system/cortex-tests.service").write_text(SERVICE)
        _checked("chroot", str(root), "systemctl", "enable", "-q", "cortex-tests.service")
        for name in ("vmlinuz", "initrd.img"):
            (found,) = root.glob(f"boot/{name}-*")
            shutil.copyfile(found, CACHE / name)
        _filesystem(root, part, SYSTEM_SIZE)
        part.rename(disk)
    return disk


def _mirror() -> str:
    """The Debian mirror of this machine."""
    format_ = "$(REPO_URI) $(CODENAME)"
    targets = subprocess.run(
        ["apt-get", "indextargets", "--format", format_], capture_output=True, text=True, check=True
    )
    for line in targets.stdout.splitlines():
        uri, codename = line.split()
        if codename == SUITE:
            return uri
    return "http://deb.debian.org/debian/"


@contextmanager
def _disk_of_tree(arguments: list[str]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        root, disk = Path(folder) / "root", Path(folder) / "tree.img"
        root.mkdir()
        venv = TREE / ".venv"
        base = Path(os.path.realpath(venv / "bin" / "python")).parents[1]
        paths = [TREE] if base == Path("/usr") else [TREE, base]
        for path in paths:
            _copy(path, root / "files" / path.relative_to("/"))
        binds = "\n".join(
            f"mkdir -p {shlex.quote(str(path))} && mount --bind "
            f"{shlex.quote(f'/tree/files{path}')} {shlex.quote(str(path))}"
            for path in paths
        )
        # A Python may be in a home folder, which the users of jobs have to traverse.
        traversable = "\n".join(
            f"chmod a+x {shlex.quote(str(parent))}" for path in paths for parent in path.parents
        )
        (root / "run").write_text(
            f"set -e\n{binds}\n{traversable}\ncd {shlex.quote(str(TREE))}\n"
            f"export VM_TEST_ARGUMENTS={shlex.quote(shlex.join(arguments))}\n"
            f"status=0\nsh tests/vm/guest.sh || status=$?\necho '{RESULT}'$status\n"
        )
        _filesystem(root, disk, "6G")
        yield disk


def _copy(source: Path, target: Path) -> None:
    """Copy a tree as hard links, since its files are only read."""

    def excluded_names(_: str, names: list[str]) -> set[str]:
        return {name for name in names if name in EXCLUDED or name.startswith(".venv-")}

    shutil.copytree(source, target, symlinks=True, ignore=excluded_names, copy_function=_link)


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # another file system
        shutil.copy2(source, target, follow_symlinks=False)
    return target


def _filesystem(root: Path, disk: Path, size: str) -> None:
    _checked("mke2fs", "-q", "-t", "ext4", "-d", str(root), str(disk), size)


def _run(system: Path, disk: Path) -> int:
    acceleration = ["-accel", "tcg,thread=multi"]  # /dev/kvm of a nested machine often hangs
    command = [
        "qemu-system-x86_64", *acceleration, "-cpu", "max", "-smp", CPUS, "-m", MEMORY,
        "-kernel", str(CACHE / "vmlinuz"), "-initrd", str(CACHE / "initrd.img"),
        "-append", "root=/dev/vda rw console=ttyS0 quiet panic=-1",
        "-drive", f"file={system},format=raw,if=virtio,snapshot=on",
        "-drive", f"file={disk},format=raw,if=virtio",
        "-serial", f"file:{CACHE / 'console.log'}", "-serial", "stdio",
        "-nic", "none", "-display", "none", "-monitor", "none", "-no-reboot",
    ]  # fmt: skip
    status: int | None = None
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace"
    ) as machine:
        assert machine.stdout is not None
        try:
            for line in machine.stdout:
                sys.stdout.write(line.replace("\r", ""))
                sys.stdout.flush()
                if line.startswith(RESULT):
                    status = int(line.removeprefix(RESULT))
        finally:
            machine.kill()
    if status is None:
        sys.exit(f"tests/vm/vm.py: the machine ended before its tests; see {CACHE / 'console.log'}")
    return status


def _checked(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
