"""When a supervisor syncs an exit record to the disk."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cortex.worker import files
from cortex.worker.supervisor.station import Station


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the synced files. Only a power cut could show that the disk has them."""
    names: list[str] = []
    monkeypatch.setattr(
        os, "fsync", lambda fd: names.append(Path(f"/proc/self/fd/{fd}").readlink().name)
    )
    return names


@pytest.fixture
def station_and_engine() -> Iterator[tuple[Station, socket.socket]]:
    """A station, and the engine's end of its socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        # No signal arrives in these tests.
        signals: Any = SimpleNamespace(wake=theirs.fileno(), wake_write=-1)
        setup: Any = SimpleNamespace(path=None)
        yield Station(setup, signals, theirs, None), ours


def test_a_station_has_an_engine_until_the_socket_is_closed(
    station_and_engine: tuple[Station, socket.socket],
) -> None:
    station, engine = station_and_engine
    assert station.has_engine()
    engine.send(b"an order that waits")
    assert station.has_engine()
    engine.close()
    assert not station.has_engine()


def test_the_last_record_that_an_engine_read_is_synced_when_the_engine_exits(
    station_and_engine: tuple[Station, socket.socket], synced: list[str], tmp_path: Path
) -> None:
    station, _ = station_and_engine
    for number in (1, 2):
        folder = os.open(tmp_path, os.O_RDONLY)
        files.replace(folder, f"exit.{number}", b"{}")
        station.remember_record(folder, f"exit.{number}")
    assert synced == []
    station.close()
    assert synced == ["exit.2"]


def test_a_record_whose_folder_was_removed_is_ignored(
    station_and_engine: tuple[Station, socket.socket], synced: list[str], tmp_path: Path
) -> None:
    station, _ = station_and_engine
    station.remember_record(os.open(tmp_path, os.O_RDONLY), "exit.1")
    station.close()
    assert synced == []


def test_a_record_that_is_written_without_an_engine_is_synced(
    synced: list[str], tmp_path: Path
) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    files.replace_durably(folder, "exit.1", b"{}")
    os.close(folder)
    assert len(synced) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["exit.1"]
