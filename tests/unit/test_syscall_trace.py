"""What tells the paths that root takes through others' folders (`syscall_trace`) misses none, and takes no other for one."""

from __future__ import annotations

from pathlib import Path

import pytest

from syscall_trace import Seen, Trace

UID = 65534
BEGIN = [
    '10 mkdir("/data/jobs/one", 0700) = 0',
    f'10 fchownat(AT_FDCWD</>, "/data/jobs/one", {UID}, {UID}, AT_SYMLINK_NOFOLLOW) = 0',
]
FORK = "10 clone(child_stack=NULL, flags=CLONE_CHILD_SETTID|SIGCHLD, child_tidptr=0x7f) = 11"


def seen(*lines: str) -> Seen:
    found = Seen()
    Trace(UID, "/", found).read([*BEGIN, *lines])
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
def test_a_path_through_a_folder_that_was_given_away_is_told(call: str) -> None:
    assert seen(f"10 {call}").wrong == [f"10 {call}"]
    # By a process that it has forked, and in two parts.
    name, _, rest = call.rpartition(" = ")
    parts = [
        f"11 {name[:-1]} <unfinished ...>",
        FORK,
        f"11 <... {name.split('(')[0]} resumed>) = {rest}",
    ]
    assert seen(*parts).wrong == [f"11 {call}"]


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
def test_other_paths_are_not(call: str) -> None:
    found = seen(f"10 {call}")
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
def test_a_name_in_an_open_folder_that_is_not_followed_is_right(call: str) -> None:
    found = seen(f"10 {call}")
    assert found.wrong == []
    assert found.right == {(call.partition("(")[0], "/data/jobs/one")}


def test_what_the_other_user_does_itself_is_not_told() -> None:
    become = [f"11 setreuid({UID}, {UID}) = 0", '11 chdir("/data/jobs/one") = 0']
    own = '11 open("/data/jobs/one/log", O_RDONLY) = 5</data/jobs/one/log>'
    assert seen(FORK, *become, own).wrong == []
    assert seen(FORK, own).wrong == [own]
    failed = f"11 setreuid({UID}, {UID}) = -1 EPERM (Operation not permitted)"
    assert seen(FORK, failed, own).wrong == [own]


def test_a_folder_is_given_away_by_its_descriptor_too_and_under_a_name_that_it_gets_later() -> None:
    given = f"10 fchown(9</data/new>, {UID}, -1) = 0"
    use = '10 open("/data/{}/x", O_RDONLY) = -1 ENOENT (No such file or directory)'
    assert seen(use.format("new"), given).wrong == []  # before it was
    assert seen(given, use.format("new")).wrong == [use.format("new")]
    moved = '10 renameat2(3</data>, "new", 3</data>, "old", RENAME_NOREPLACE) = 0'
    assert seen(given, moved, use.format("old")).wrong == [use.format("old")]


def test_a_folder_that_only_a_group_was_given_is_still_roots() -> None:
    given = f'10 chown("/data/jobs", -1, {UID}) = 0'
    assert seen(given, '10 mkdir("/data/jobs/two", 0700) = 0').wrong == []


def test_a_folder_that_the_other_user_may_write_in_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    use = f'10 open("{tmp_path}/x", O_RDONLY) = -1 ENOENT (No such file or directory)'
    assert seen(use).wrong == [use]
    tmp_path.chmod(0o1777)  # there each entry is its owner's alone
    assert seen(use).wrong == []


def test_relative_paths_are_those_of_the_folder_that_it_went_into() -> None:
    went = '10 chdir("/data") = 0'
    use = '10 open("jobs/one/log", O_RDONLY) = 5</data/jobs/one/log>'
    assert seen(use).wrong == []
    assert seen(went, use).wrong == [use]
    assert seen("10 fchdir(3</data>) = 0", use).wrong == [use]
