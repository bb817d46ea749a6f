"""`syscall_trace` reports each path that root takes through a folder of another user, and no other
path."""

from __future__ import annotations

from pathlib import Path

import pytest

from syscall_trace import Findings, Trace

UID = 65534
GIVE_AWAY = [
    '10 mkdir("/data/jobs/one", 0700) = 0',
    f'10 fchownat(AT_FDCWD</>, "/data/jobs/one", {UID}, {UID}, AT_SYMLINK_NOFOLLOW) = 0',
]
FORK = "10 clone(child_stack=NULL, flags=CLONE_CHILD_SETTID|SIGCHLD, child_tidptr=0x7f) = 11"


def traced(*lines: str) -> Findings:
    found = Findings()
    Trace(UID, "/", found).read([*GIVE_AWAY, *lines])
    assert found.given >= {"/data/jobs/one"}
    return found


@pytest.mark.parametrize(
    "call",
    [
        'open("/data/jobs/one/log", O_RDONLY|O_NOFOLLOW) = 5</data/jobs/one/log>',
        'openat(AT_FDCWD</>, "/data/jobs/one/log", O_RDONLY|O_NOFOLLOW) = -1 ENOENT (No such file)',
        'openat(AT_FDCWD</data/jobs>, "one/log", O_RDONLY|O_NOFOLLOW) = 5</data/jobs/one/log>',
        'openat(7</data/jobs>, "one/log", O_RDONLY|O_NOFOLLOW) = 5</data/jobs/one/log>',
        'openat(7</data/jobs/one>, "log", O_RDONLY|O_CLOEXEC) = 5</data/jobs/one/log>',
        'openat(7</data/jobs/one>(deleted), "log", O_RDONLY) = 5</data/jobs/one/log>',
        'openat(7</data/jobs/one>, "files/log", O_RDONLY|O_NOFOLLOW) = 5</data/jobs/one/files/log>',
        'openat(7</data/jobs/one/files>, "a", O_WRONLY|O_CREAT, 0666) = 5</data/jobs/one/files/a>',
        'linkat(7</data/jobs/one>, "a", 7</data/jobs/one>, "b", AT_SYMLINK_FOLLOW) = 0',
        'linkat(7</data/jobs/one>, "a, \\"b", 7</data/jobs/one>, "b", AT_SYMLINK_FOLLOW) = 0',
        'newfstatat(7</data/jobs/one>, "log", {st_mode=S_IFREG|0644, st_size=1, ...}, 0) = 0',
        'stat("/data/jobs/one/../two", {st_mode=S_IFREG|0644, st_size=1, ...}) = 0',
        'chmod("/data/jobs/one/files/a", 0700) = 0',
        'rename("/data/x", "/data/jobs/one/x") = 0',
        'execve("/data/jobs/one/python", ["python", "-c", "x"], 0x7f /* 20 vars */) = 0',
        'inotify_add_watch(8<anon_inode:inotify>, "/data/jobs/one/log", IN_MODIFY) = 1',
        'symlink("/etc", "/data/jobs/one/etc") = 0',
        'chown("/proc/self/fd/9/log", 0, 0) = 0',
        'readlink("/proc/12/cwd/log", 0x7f, 99) = -1 EINVAL (Invalid argument)',
    ],
)
def test_a_path_through_a_folder_that_was_given_away_is_reported(call: str) -> None:
    assert traced(f"10 {call}").wrong == [f"10 {call}"]
    # The same call, by a forked process and in two parts.
    name, _, rest = call.rpartition(" = ")
    parts = [
        f"11 {name[:-1]} <unfinished ...>",
        FORK,
        f"11 <... {name.split('(')[0]} resumed>) = {rest}",
    ]
    assert traced(*parts).wrong == [f"11 {call}"]


@pytest.mark.parametrize(
    "call",
    [
        'mkdir("/data/jobs/two", 0700) = 0',
        'openat(AT_FDCWD</>, "/data/jobs/one", O_RDONLY|O_DIRECTORY) = 7</data/jobs/one>',
        'openat(AT_FDCWD</data/jobs>, "two/log", O_RDONLY) = -1 ENOENT (No such file or directory)',
        'open("/data/jobs/onemore/log", O_RDONLY) = -1 ENOENT (No such file or directory)',
        'symlink("/data/jobs/one/log", "/data/link") = 0',
        'openat(AT_FDCWD</>, "/proc/self/fd/9", O_WRONLY) = 10</data/jobs/one/start.1>',
        'open("/proc/10/environ", O_RDONLY) = 9</proc/10/environ>',
    ],
)
def test_other_paths_are_not_reported(call: str) -> None:
    found = traced(f"10 {call}")
    assert (found.wrong, found.right) == ([], set())


@pytest.mark.parametrize(
    "call",
    [
        'openat(7</data/jobs/one>, "log", O_RDONLY|O_NOFOLLOW) = 5</data/jobs/one/log>',
        'openat(7</data/jobs/one>, "log", O_WRONLY|O_CREAT|O_EXCL, 0644) = 5</data/jobs/one/log>',
        'newfstatat(7</data/jobs/one>, "log", {st_mode=S_IFREG|0644, ...}, AT_SYMLINK_NOFOLLOW) = 0',
        'unlinkat(7</data/jobs/one>, "files", AT_REMOVEDIR) = 0',
        'linkat(6</data/jobs>, ".start.1", 7</data/jobs/one>, "start.1", 0) = 0',
        'renameat(6</data/archived>, "part", 7</data/jobs/one>, "log") = 0',
        'fchownat(7</data/jobs/one>, "log", 0, 0, AT_SYMLINK_NOFOLLOW) = 0',
    ],
)
def test_a_name_in_an_open_folder_is_right_if_links_are_not_followed(call: str) -> None:
    found = traced(f"10 {call}")
    assert found.wrong == []
    assert found.right == {(call.partition("(")[0], "/data/jobs/one")}


def test_calls_by_the_other_user_are_not_reported() -> None:
    become = [f"11 setreuid({UID}, {UID}) = 0", '11 chdir("/data/jobs/one") = 0']
    own = '11 open("/data/jobs/one/log", O_RDONLY) = 5</data/jobs/one/log>'
    assert traced(FORK, *become, own).wrong == []
    assert traced(FORK, own).wrong == [own]
    failed = f"11 setreuid({UID}, {UID}) = -1 EPERM (Operation not permitted)"
    assert traced(FORK, failed, own).wrong == [own]


def test_a_folder_given_away_by_its_descriptor_counts_under_its_later_names() -> None:
    given = f"10 fchown(9</data/new>, {UID}, -1) = 0"
    use = '10 open("/data/{}/x", O_RDONLY) = -1 ENOENT (No such file or directory)'
    assert traced(use.format("new"), given).wrong == []  # used before it was given away
    assert traced(given, use.format("new")).wrong == [use.format("new")]
    moved = '10 renameat2(3</data>, "new", 3</data>, "old", RENAME_NOREPLACE) = 0'
    assert traced(given, moved, use.format("old")).wrong == [use.format("old")]


def test_a_folder_given_to_a_group_alone_is_still_roots() -> None:
    given = f'10 chown("/data/jobs", -1, {UID}) = 0'
    assert traced(given, '10 mkdir("/data/jobs/two", 0700) = 0').wrong == []


def test_a_folder_in_which_the_other_user_may_write_is_reported(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    use = f'10 open("{tmp_path}/x", O_RDONLY) = -1 ENOENT (No such file or directory)'
    assert traced(use).wrong == [use]
    tmp_path.chmod(0o1777)  # with the sticky bit, only its owner can replace an entry
    assert traced(use).wrong == []


def test_relative_paths_are_resolved_in_the_working_folder() -> None:
    into_data = '10 chdir("/data") = 0'
    use = '10 open("jobs/one/log", O_RDONLY) = 5</data/jobs/one/log>'
    assert traced(use).wrong == []
    assert traced(into_data, use).wrong == [use]
    assert traced("10 fchdir(3</data>) = 0", use).wrong == [use]
