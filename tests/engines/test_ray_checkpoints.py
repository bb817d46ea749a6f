"""Checkpoints of jobs: what a lost attempt has left in `$CORTEX_JOB_DIR/checkpoint` follows the job
to its next node. On nodes without Ray (`ray`)."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import os
import random
import signal
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import JsonValue

from cortex.engines.base import Attempt, Ended, Engine, Lost, NeverStarted
from cortex.engines.ray import RayEngine
from cortex.engines.ray import checkpoints as copies
from cortex.engines.ray.messages import Checkpoint
from cortex.engines.ray.validation import checked_checkpoint
from cortex.errors import StorageUnavailable
from cortex.objects import ObjectStore
from cortex.operator.checkpoints import Checkpoints
from cortex.ray_node import checkpoints as node_checkpoints
from cortex.ray_node.agent import Agent
from cortex.ray_node.checkpoints import _content, _pack
from cortex.worker import checks
from engines.engine_harness import until
from engines.in_process_ray import InProcessHarness, in_process_harness

MIB = 1 << 20
# The first attempt does what the test tells it in `config["first"]`, and sleeps. The next one
# returns what it finds.
CODE = """
    import os, time
    folder = os.path.join(os.environ["CORTEX_JOB_DIR"], "checkpoint")

    def found():
        return {
            os.path.relpath(os.path.join(parent, name), folder): [
                open(os.path.join(parent, name)).read(100),
                bool(os.stat(os.path.join(parent, name)).st_mode & 0o100),
            ]
            for parent, _, names in os.walk(folder) for name in names
        }

    def write(name, text):
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + ".half", "w") as file:
            file.write(text)
        os.replace(path + ".half", path)

    def task(config):
        print("begins with", sorted(found()), os.getppid(), os.getpid(), flush=True)
        attempt = int(os.environ["CORTEX_ATTEMPT"])
        if attempt > len(config["steps"]):
            return found()
        exec(config["steps"][attempt - 1])
        print("done", attempt, flush=True)
        while True:
            time.sleep(0.01)
            if os.path.exists(config["more"]):
                exec(open(config["more"]).read())
                os.remove(config["more"])
"""


class Store(Checkpoints):
    """The operator's store, which a test can break."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, None)
        self.root = root
        self.is_away = False
        self.saved: list[Checkpoint] = []

    def save(self, checkpoint: Checkpoint, archive: Any) -> None:
        if self.is_away:
            raise StorageUnavailable("away")
        super().save(checkpoint, archive)
        self.saved.append(checkpoint)

    def fetch(self, job_id: str) -> copies.StoredCheckpoint | None:
        if self.is_away:
            raise StorageUnavailable("away")
        return super().fetch(job_id)


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InProcessHarness]:
    monkeypatch.setattr(node_checkpoints, "LOOK_INTERVAL_S", 0.05)
    monkeypatch.setattr(node_checkpoints, "SETTLE_S", 0.03)
    monkeypatch.setattr(copies, "STORE_RETRY_DELAY_S", 0.05)
    with in_process_harness(tmp_path, monkeypatch) as made:
        folder = tmp_path / "checkpoints"
        folder.mkdir()
        made.checkpoints = Store(folder)
        yield made
    assert not list(folder.glob(".incoming*"))


def job(
    harness: InProcessHarness, *steps: str, retries: int = 2, limit: int = MIB, code: str = CODE
) -> Attempt:
    """An attempt of a job whose attempts do these steps, one each."""
    config: dict[str, JsonValue] = {"steps": list(steps), "more": str(harness.root.parent / "more")}
    attempt = harness.attempt(code, config=config)
    api = attempt.version.api
    limits = api.limits.model_copy(update={"checkpoint": limit})
    api = api.model_copy(update={"retries": retries, "limits": limits})
    return replace(attempt, version=replace(attempt.version, api=api))


def do(harness: InProcessHarness, code: str) -> None:
    """Let the running attempt execute this."""
    path = harness.root.parent / "more"
    path.with_name("more.half").write_text(code)
    path.with_name("more.half").replace(path)


async def begin(harness: InProcessHarness, engine: Engine, attempt: Attempt) -> Attempt:
    """Start an attempt, and wait until it has done its step."""
    attempt = await harness.start_attempt(engine, attempt, attempt.number)
    await harness.printed(attempt, f"done {attempt.losses + 1}\n")
    return attempt


def following(attempt: Attempt) -> Attempt:
    return replace(attempt, number=attempt.number + 1, losses=attempt.losses + 1)


async def result(harness: InProcessHarness, engine: Engine, attempt: Attempt) -> Any:
    return (
        await harness.ended(await harness.start_attempt(engine, attempt, attempt.number))
    ).result


def stored(harness: InProcessHarness, attempt: Attempt) -> dict[str, bytes]:
    """The files of the stored checkpoint."""
    found = harness.checkpoints.fetch(attempt.spec.job_id)
    if found is None:
        return {}
    with found.file, tarfile.open(fileobj=found.file, mode="r:gz") as tar:
        members = [member for member in tar.getmembers() if member.isreg()]
        return {member.name: tar.extractfile(member).read() for member in members}  # type: ignore[union-attr]  # a file


def kill(harness: InProcessHarness, attempt: Attempt) -> None:
    """Kill the supervisor of an attempt, and its process."""
    for word in harness.log(attempt).split("begins with")[-1].split("\n")[0].split()[-2:]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(word), signal.SIGKILL)


def test_the_next_attempt_on_another_node_has_the_files(harness: InProcessHarness) -> None:
    steps = """
write("model", "step 7")
write("deep/er/optimizer", "adam")
os.chmod(folder + "/model", 0o755)
os.makedirs(folder + "/empty")
"""

    async def scenario(engine: Engine) -> None:
        attempt = await begin(harness, engine, job(harness, steps))
        await until(lambda: len(stored(harness, attempt)) == 2)
        await harness.replace_node(engine, "a", "b")
        assert isinstance(await harness.final(attempt), Lost)
        assert await result(harness, engine, following(attempt)) == {
            "model": ["step 7", True],
            "deep/er/optimizer": ["adam", False],
        }
        assert "its checkpoint is being sent to b" in harness.wait_reasons
        folder = harness.root.parent / "nodes" / "near" / "1" / "jobs" / attempt.spec.job_id
        assert (folder / "files" / "checkpoint" / "empty").is_dir()
        assert list((folder.parents[1] / "checkpoints").iterdir()) == []
        await until(lambda: list(harness.checkpoints.root.iterdir()) == [])  # the job has ended

    harness.run(scenario)


def test_links_pipes_and_sockets_are_left_out(harness: InProcessHarness, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    steps = f"""
write("model", "step 7")
os.symlink({str(tmp_path / "secret")!r}, folder + "/link")
os.symlink({str(tmp_path)!r}, folder + "/folder-link")
os.mkfifo(folder + "/pipe")
import socket
os.chdir(folder)
kept = socket.socket(socket.AF_UNIX); kept.bind("socket")
"""

    async def scenario(engine: Engine) -> None:
        attempt = await begin(harness, engine, job(harness, steps))
        await until(lambda: stored(harness, attempt) == {"model": b"step 7"})
        await harness.replace_node(engine, "a", "b")
        await harness.final(attempt)
        assert await result(harness, engine, following(attempt)) == {"model": ["step 7", False]}

    harness.run(scenario)


def test_a_folder_that_is_a_link_is_no_checkpoint(
    harness: InProcessHarness, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("secret")
    steps = f"os.symlink({str(tmp_path / 'elsewhere')!r}, folder)"

    async def scenario(engine: Engine) -> None:
        attempt = await begin(harness, engine, job(harness, steps))
        do(harness, "os.remove(folder); write('model', 'real')")
        await until(lambda: harness.checkpoints.saved)
        assert stored(harness, attempt) == {"model": b"real"}
        engine.stop(attempt.spec.job_id)
        await harness.final(attempt)

    harness.run(scenario)


def test_each_change_is_stored_and_the_last_attempt_stores_nothing(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        first = await begin(
            harness, engine, job(harness, "write('a', '1')", "write('b', '2')", retries=1)
        )
        await until(lambda: stored(harness, first) == {"a": b"1"})
        do(harness, "write('a', '11')")
        await until(lambda: stored(harness, first) == {"a": b"11"})
        assert {each.attempt for each in harness.checkpoints.saved} == {1}
        await harness.replace_node(engine, "a", "b")
        await harness.final(first)
        second = await begin(harness, engine, following(first))
        assert harness.ray.agent is not None
        assert not harness.ray.agent._checkpoints.is_watched(second.spec.job_id)
        assert stored(harness, second) == {"a": b"11"}
        engine.stop(second.spec.job_id)
        await harness.final(second)

    harness.run(scenario)


def test_a_job_without_retries_stores_nothing(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await begin(harness, engine, job(harness, "write('a', '1')", retries=0))
        assert harness.ray.agent is not None
        assert not harness.ray.agent._checkpoints.is_watched(attempt.spec.job_id)
        other = await begin(harness, engine, job(harness, "write('a', '1')"))
        await until(lambda: harness.checkpoints.saved)
        assert stored(harness, attempt) == {}
        for each in (attempt, other):
            engine.stop(each.spec.job_id)
            await harness.final(each)
        assert "read_checkpoint" in harness.ray.calls

    harness.run(scenario)


def test_a_checkpoint_over_its_limit_is_not_stored_and_the_log_says_so(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = job(harness, "write('a', '1')", limit=1000)
        attempt = await begin(harness, engine, attempt)
        await until(lambda: stored(harness, attempt) == {"a": b"1"})
        do(harness, "write('b', 'x' * 1000)")
        said = (
            "cortex: the checkpoint is not stored: it is over limits.checkpoint, 1000 B; the last "
            "complete one is kept\n"
        )
        await harness.printed(attempt, said)
        do(harness, "write('c', 'x' * 1000)")
        await until(lambda: not (harness.root.parent / "more").exists())
        await asyncio.sleep(0.2)
        assert harness.log(attempt).count(said) == 1
        await harness.replace_node(engine, "a", "b")
        await harness.final(attempt)
        assert await result(harness, engine, following(attempt)) == {"a": ["1", False]}

    harness.run(scenario)


def test_too_many_files_are_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_checkpoints, "MAX_PROJECT_FILES", 3)
    for name in "abc":
        (tmp_path / name).touch()
    assert len(_content(tmp_path, MIB)) == 3
    (tmp_path / "d").mkdir()
    with pytest.raises(node_checkpoints._TooLarge, match="over 3 files and folders"):
        _content(tmp_path, MIB)


def test_a_loss_without_the_loss_of_the_node_brings_the_last_files(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await begin(harness, engine, job(harness, "write('a', '1')"))
        await until(lambda: stored(harness, attempt) == {"a": b"1"})
        monkeypatch.setattr(node_checkpoints, "LOOK_INTERVAL_S", 600)
        await asyncio.sleep(0.2)  # the watch sleeps for long from now on
        do(harness, "write('a', 'last')")
        await until(lambda: not (harness.root.parent / "more").exists())
        kill(harness, attempt)
        assert isinstance(await harness.final(attempt), Lost)
        await until(lambda: stored(harness, attempt) == {"a": b"last"})
        await harness.replace_node(engine, "a", "b")
        assert await result(harness, engine, following(attempt)) == {"a": ["last", False]}

    harness.run(scenario)


def test_the_next_attempt_on_the_same_node_keeps_its_files(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await begin(harness, engine, job(harness, "write('a', '1')"))
        await until(lambda: stored(harness, attempt) == {"a": b"1"})
        harness.checkpoints.is_away = True  # not even needed
        do(harness, "os.symlink('a', folder + '/link'); write('a', 'last')")
        await until(lambda: not (harness.root.parent / "more").exists())
        kill(harness, attempt)
        assert isinstance(await harness.final(attempt), Lost)
        harness.checkpoints.is_away = False
        found = await result(harness, engine, following(attempt))
        assert found == {"a": ["last", False], "link": ["last", False]}
        assert "install_checkpoint" not in harness.ray.calls

    harness.run(scenario)


def test_files_of_an_attempt_before_that_of_the_checkpoint_are_replaced(
    harness: InProcessHarness,
) -> None:
    """A node has run the first attempt, another one the second, and the third comes back."""

    async def scenario(engine: Engine) -> None:
        attempt = await begin(harness, engine, job(harness, "write('old', '1')", "pass"))
        await until(lambda: stored(harness, attempt) == {"old": b"1"})
        kill(harness, attempt)
        await harness.final(attempt)
        await until(lambda: harness.ray.calls.count("drop_checkpoint") == 1)
        archive = tar_gz({"new": b"2"})
        digest = hashlib.sha256(archive).hexdigest()
        of_second = Checkpoint(attempt.spec.job_id, 2, len(archive), digest)
        harness.checkpoints.save(of_second, io.BytesIO(archive))
        # Attempts that were fenced off have a record, and have not run.
        record = harness.folder(attempt) / "start.3"
        record.write_text(json.dumps({"fenced": True}))
        fourth = replace(attempt, number=4, losses=2)
        assert await result(harness, engine, fourth) == {"new": ["2", False]}

    harness.run(scenario)


def tar_gz(files: dict[str, bytes], link: str | None = None) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        if link is not None:
            member = tarfile.TarInfo("link")
            member.type, member.linkname = tarfile.SYMTYPE, link
            tar.addfile(member)
    return data.getvalue()


@pytest.mark.parametrize(
    "archive",
    [b"no archive", tar_gz({"../out": b"x"}), tar_gz({}, "/etc")],
    ids=["no archive", "a name that leads out", "a link that leads out"],
)
def test_an_attempt_without_a_usable_checkpoint_begins_anew_and_its_log_says_so(
    harness: InProcessHarness, archive: bytes
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = following(job(harness))
        digest = hashlib.sha256(archive).hexdigest()
        saved = Checkpoint(attempt.spec.job_id, 1, len(archive), digest)
        harness.checkpoints.save(saved, io.BytesIO(archive))
        assert await result(harness, engine, attempt) == {}
        assert "cortex: the checkpoint cannot be used: " in harness.log(attempt)
        assert list((harness.agent_folder / "checkpoints").iterdir()) == []

    harness.run(scenario)


def test_an_archive_that_arrives_damaged_is_not_stored(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged: list[bytes] = []
    read = Agent.read_checkpoint

    async def damage(self: Agent, job_id: str, digest: str, offset: int) -> bytes | None:
        data = await read(self, job_id, digest, offset)
        if data is not None and harness.checkpoints.saved and len(damaged) < 2:
            damaged.append(data)
            # Of the same size at first, and shorter then.
            return bytes(len(data)) if len(damaged) == 1 else data[1:]
        return data

    monkeypatch.setattr(Agent, "read_checkpoint", damage)

    async def scenario(engine: Engine) -> None:
        attempt = await begin(harness, engine, job(harness, "write('a', '1')"))
        job_id = attempt.spec.job_id
        await until(lambda: stored(harness, attempt) == {"a": b"1"})
        await until(lambda: "drop_checkpoint" in harness.ray.calls)
        do(harness, "write('a', '2')")
        await until(lambda: len(damaged) == 1)
        assert isinstance(engine, RayEngine)
        for count in (1, 2):
            await until(lambda: not engine._attempts._checkpoints._copies)
            assert stored(harness, attempt) == {"a": b"1"}
            assert len(damaged) == count
            assert harness.ray.agent is not None
            harness.ray.agent._checkpoints.offer_again(job_id)  # as to the next operator
            await until(lambda: len(damaged) == 2)
        await until(lambda: stored(harness, attempt) == {"a": b"2"})
        engine.stop(job_id)
        await harness.final(attempt)

    harness.run(scenario)


def test_the_next_operator_gets_what_its_predecessor_has_not_stored(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        harness.checkpoints.is_away = True
        attempt = await begin(harness, engine, job(harness, "write('a', '1')"))
        await until(lambda: "read_checkpoint" in harness.ray.calls)
        await engine.close()
        harness.checkpoints.is_away = False
        following_engine = harness.new_engine()
        await following_engine.open(harness.report)
        try:
            await following_engine.recover(attempt)
            await until(lambda: stored(harness, attempt) == {"a": b"1"})
            following_engine.stop(attempt.spec.job_id)
            await harness.final(attempt)
        finally:
            await following_engine.close()

    harness.run(scenario)


def test_the_next_agent_packs_again(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await begin(harness, engine, job(harness, "write('a', '1')"))
        await until(lambda: stored(harness, attempt) == {"a": b"1"})
        await harness.ray.kill_agent()
        do(harness, "write('a', '2')")
        await until(lambda: stored(harness, attempt) == {"a": b"2"})
        engine.stop(attempt.spec.job_id)
        await harness.final(attempt)

    harness.run(scenario)


def test_an_attempt_waits_for_a_store_that_is_away(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        harness.checkpoints.is_away = True
        attempt = await harness.start_attempt(engine, following(job(harness)), 2)
        final = await harness.final(attempt)
        assert isinstance(final, NeverStarted)
        assert final.held_up_by == "away"
        harness.checkpoints.is_away = False
        assert await result(harness, engine, replace(attempt, number=3)) == {}

    harness.run(scenario)


def test_a_large_checkpoint_travels_in_pieces(harness: InProcessHarness) -> None:
    steps = "import random; write('a', random.Random(1).randbytes(900_000).hex())"
    text = random.Random(1).randbytes(900_000).hex()

    async def scenario(engine: Engine) -> None:
        attempt = await begin(harness, engine, job(harness, steps, limit=10 * MIB))
        await until(lambda: stored(harness, attempt) == {"a": text.encode()})
        assert harness.ray.calls.count("read_checkpoint") > 10
        await harness.replace_node(engine, "a", "b")
        await harness.final(attempt)
        assert await result(harness, engine, following(attempt)) == {"a": [text[:100], False]}

    harness.run(scenario)


def test_an_offer_expires(harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operator has not fetched is packed and offered again."""
    monkeypatch.setattr(node_checkpoints, "OFFER_TIMEOUT_S", 0.2)

    async def scenario(engine: Engine) -> None:
        assert isinstance(engine, RayEngine)
        ignored: list[Checkpoint] = []
        # An operator that does not come.
        monkeypatch.setattr(
            engine._attempts._checkpoints, "copy", lambda _, offered: ignored.append(offered)
        )
        attempt = await begin(harness, engine, job(harness, "write('a', '1')"))
        await until(lambda: len(ignored) == 1)
        await until(lambda: len(ignored) == 3)
        assert len(set(ignored)) == 1
        folder = harness.agent_folder / "checkpoints"
        assert len(list(folder.iterdir())) <= 1
        engine.stop(attempt.spec.job_id)
        assert isinstance(await harness.final(attempt), Ended)
        assert list(folder.iterdir()) == []

    harness.run(scenario)


def test_a_folder_that_changes_while_it_is_packed_is_not_packed(tmp_path: Path) -> None:
    folder, path = tmp_path / "checkpoint", tmp_path / "archive"
    folder.mkdir()
    (folder / "a").write_text("content")
    before = _content(folder, MIB)
    assert _pack(folder, before, path, MIB) is not None
    path.unlink()

    def make_a_link() -> None:
        (folder / "a").unlink()
        (folder / "a").symlink_to("b")

    changes: dict[str, Callable[[], object]] = {
        "shorter": lambda: (folder / "a").write_text("con"),
        "longer": lambda: (folder / "a").write_text("content, and more"),
        "more": lambda: (folder / "b").write_text(""),
        "too large": lambda: (folder / "c").write_bytes(bytes(MIB + 1)),
        "a link": make_a_link,
        "gone": (folder / "a").unlink,
    }
    for what, change in changes.items():
        change()
        assert _pack(folder, before, path, MIB) is None, what
        assert not path.exists()


def test_a_disk_that_refuses_an_archive_is_named_in_the_log(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    async def scenario(engine: Engine) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(node_checkpoints, "_pack", full)
            attempt = await begin(harness, engine, job(harness, "write('a', '1')"))
            await harness.printed(
                attempt, "cortex: the checkpoint cannot be stored: No space left on device\n"
            )
        await until(lambda: stored(harness, attempt) == {"a": b"1"})
        engine.stop(attempt.spec.job_id)
        await harness.final(attempt)

    harness.run(scenario)


def test_an_invalid_offer_is_ignored() -> None:
    offer = Checkpoint("job", 1, 100, "0" * 64)
    assert checked_checkpoint(offer, 0) is offer
    for wrong in (
        replace(offer, size=0),
        replace(offer, size=1 << 40),
        replace(offer, size="1"),  # type: ignore[arg-type]  # what a job might send
        replace(offer, digest="0" * 63),
        replace(offer, digest=None),  # type: ignore[arg-type]  # what a job might send
    ):
        with pytest.raises(checks.Invalid):
            checked_checkpoint(wrong, MIB)


@pytest.mark.parametrize("kind", ["folder", "object store"])
def test_the_store_replaces_finds_and_removes(tmp_path: Path, kind: str) -> None:
    (tmp_path / "objects").mkdir()
    (tmp_path / "root").mkdir()
    objects = ObjectStore(f"file://{tmp_path / 'objects'}") if kind == "object store" else None
    store = Checkpoints(tmp_path / "root", objects)
    assert store.fetch("job") is None
    for content in (b"first", b"second"):
        saved = Checkpoint("job", 3, len(content), hashlib.sha256(content).hexdigest())
        store.save(saved, io.BytesIO(content))
        found = store.fetch("job")
        assert found is not None
        with found.file:
            assert (found.checkpoint, found.file.read()) == (saved, content)
    path = tmp_path / "root" / "job" if objects is None else tmp_path / "objects/checkpoints/job"
    whole = path.read_bytes()
    for damaged in (b"", b"x" + whole[1:], whole[:-1], whole[1:], b"x" * len(whole)):
        path.write_bytes(damaged)
        assert store.fetch("job") is None
    store.remove(["job", "other"])
    assert not path.exists()
    (tmp_path / "root" / ".incoming-1").touch()
    store.remove_leftovers()
    assert list((tmp_path / "root").iterdir()) == []
