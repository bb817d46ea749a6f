"""Odd values: texts, JSON, header values and mutations of bytes. All are drawn from a
`random.Random`, so that a seed gives the same values again."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

WORDS = [
    "", " ", ".", "..", "...", "/", "//", "~", "-", "_", "*", "?", "#", "%", "%00", "%0a", "%0d%0a",
    "%2e%2e", "%2e%2e%2f", "%2f", "%ff", "%ed%a0%80", "%C0%AF", "%", "%zz", "%u0041", "+", "a b",
    "null", "None", "true", "false", "NaN", "inf", "-inf", "1e400", "-1", "0", "00", "1", "1.5", "1_0",
    "0x10", "9" * 19, "9" * 30, "9" * 5000, "-" + "9" * 400, str(2**63), str(2**63 - 1), str(-(2**63)),
    "1e-400", "\u0663", "\uff11", "\u00e4", "\u2603", "\U0001d11e", "\ufeff", "\u202e", "\u0000", "\n",
    "\r\n", "\t", "\x1b[31m", "\x7f", "'", '"', "' OR 1=1 --", "<script>", "{{7*7}}", "${HOME}", "$(id)",
    "`id`", "../../etc/passwd", "/etc/passwd", "C:\\", "file:///etc/passwd", "a" * 300, "a" * 3000,
    "healthz", "readyz", "metrics", "-", "openapi.json", "apis", "jobs", "logs", "info",
]  # fmt: skip
NUMBERS = [
    "0", "-0", "1", "-1", "60", "1.0", "0.5", "1e2", "1e400", "-1e400", "1E+99999999", "1e-99999999",
    "10" + "0" * 400, "1" + "0" * 4298, "1" + "0" * 5000, "-" + "9" * 5000, "9" * 4300, "9" * 309,
    str(2**63), str(2**63 - 1), str(2**64), str(2**53 + 1), "01", "+1", "1.", ".5", "0x1", "1_000",
    "NaN", "Infinity", "-Infinity", "١",
]  # fmt: skip
TOKENS = [
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u", b"\\ud800", b"\\udc00\\ud800", b"\x00",
    b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc0\xaf", b"\r\n", b"\n", b"null", b"true",
    b"NaN", b"1e400", b"-", b"//", b"/*", b"9" * 400, b"[" * 50, b'{"a":' * 50, b"config", b"timeout",
    b"workers", b"%00", b"..", b"../", b"\t", b"\x7f", b"&", b"*a", b"&a ", b"<<", b"!!", b"!!python/object",
    b"---\n", b"...\n", b"|\n", b"> ", b"? ", b"- ", b"'", b"#", b"%YAML 9.9\n", b"@", b"`", b"\xc2\x85",
]  # fmt: skip


def word(rng: random.Random) -> str:
    """A text that a program may fail to handle."""
    if rng.random() < 0.7:
        return rng.choice(WORDS)
    if rng.random() < 0.5:
        return rng.choice(WORDS) + rng.choice(WORDS)
    return "".join(chr(_point(rng)) for _ in range(rng.randrange(1, 30)))


def _point(rng: random.Random) -> int:
    point = rng.choice([rng.randrange(128), rng.randrange(0x800), rng.randrange(0x11_0000)])
    return 0xFFFD if 0xD800 <= point < 0xE000 else point


def mutated(rng: random.Random, data: bytes, most: int = 4) -> bytes:
    """The bytes with a few places changed."""
    for _ in range(rng.randint(1, most)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice([1, 1, 2, 8, 64]))
        change = rng.randrange(7)
        if change == 0:
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        elif change == 1:
            data = data[:at] + rng.choice(TOKENS) + data[at:]
        elif change == 2:
            data = data[:at] + data[end:]
        elif change == 3:
            data = data[:at] + data[at:end] * rng.choice([2, 3, 50]) + data[end:]
        elif change == 4:
            data = data[:at]
        elif change == 5 and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        else:
            data = data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[end:]
    return data


def header_value(rng: random.Random) -> bytes:
    """A header's value without line breaks, often with bytes that are not allowed."""
    how = rng.randrange(6)
    if how == 0:
        return bytes(
            rng.choice([*range(0x20, 0x7F), *range(0x80, 0x100)]) for _ in range(rng.randrange(40))
        )
    if how == 1:
        return rng.randbytes(rng.randrange(20)).replace(b"\r", b"").replace(b"\n", b"")
    if how == 2:
        return b"x" * rng.choice([254, 255, 256, 4000, 20_000])
    if how == 3:
        return rng.choice(NUMBERS).encode()
    return word(rng).replace("\r", "").replace("\n", "").encode()


def json_value(rng: random.Random, depth: int = 0) -> object:
    """A JSON value, most often with odd scalars."""
    kind = rng.randrange(8 if depth < 4 else 6)
    if kind == 6:
        return [json_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    if kind == 7:
        return {word(rng): json_value(rng, depth + 1) for _ in range(rng.randrange(5))}
    scalars: list[object] = [
        None, True, rng.randint(-5, 100), rng.random() * 1e6, 2 ** rng.randrange(200), word(rng),
    ]  # fmt: skip
    return scalars[kind]


def submission(rng: random.Random) -> bytes:
    """The body of a submit: valid, nearly valid, or invalid."""
    return rng.choices(
        [_valid, _fields, _mutated, _odd_documents, _nested, _numbers], [1, 3, 5, 4, 3, 4]
    )[0](rng)


VALID = [
    b"{}",
    b'{"timeout": 60}',
    b'{"config": {"a": [1, 2, {"b": null}]}, "timeout": null, "workers": 1}',
    b'{"config": {"text": "\\u00e4\\ud834\\udd1e", "f": 0.1, "deep": [[[{}]]]}}',
    '{"config": {"ä": "☃"}, "timeout": 3600}'.encode(),
]


def _valid(rng: random.Random) -> bytes:
    return rng.choice(VALID)


def _mutated(rng: random.Random) -> bytes:
    return mutated(rng, rng.choice(VALID))


def _fields(rng: random.Random) -> bytes:
    names = ["config", "timeout", "workers", "job_id", "Config", "", word(rng)]
    chosen = {rng.choice(names): json_value(rng) for _ in range(rng.randrange(4))}
    if rng.random() < 0.4:
        chosen["config"] = {word(rng): json_value(rng) for _ in range(rng.randrange(6))}
    return json.dumps(chosen, ensure_ascii=rng.random() < 0.5).encode()


def _numbers(rng: random.Random) -> bytes:
    number = rng.choice(NUMBERS)
    return (
        rng.choice(
            [
                '{"timeout": %s}',
                '{"config": {"x": %s}}',
                '{"workers": %s}',
                '{"config": %s}',
                "%s",
                '{"x": [%s]}',
            ]
        )
        .replace("%s", number)
        .encode()
    )


def _nested(rng: random.Random) -> bytes:
    """Nesting around the depth limits of the operator's parsers and serialisers."""
    depth = rng.choice(
        [rng.randrange(90, 130), rng.randrange(180, 270), rng.randrange(300, 1100), 5000, 100_000]
    )
    opened, closed = rng.choice([("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
    inside = opened * depth + rng.choice(["", "1", '"x"']) + closed * rng.choice([depth, depth - 1])
    if opened != "[":
        inside = inside.replace(":}", ":1}")
    around = rng.choice(
        ['{"config": {"x": %s}}', '{"config": %s}', '{"timeout": %s}', '{"extra": %s}', "%s"]
    )
    return around.replace("%s", inside).encode()


def _odd_documents(rng: random.Random) -> bytes:
    specials: list[Callable[[], bytes]] = [
        lambda: b"",
        lambda: b" \t\r\n",
        lambda: b"\xef\xbb\xbf{}",
        lambda: '{"config": {"x": 1}}'.encode(rng.choice(["utf-16", "utf-16-le", "utf-32", "utf-32-be"])),
        lambda: b"{}\x00",
        lambda: b"{}{}",
        lambda: b'{"config": {"a": 1, "a": 2}, "config": {"b": 1}}',
        lambda: b'{"timeout": 1, "timeout": "x"}',
        lambda: b'{"config": {"x": "' + rng.choice([b"\xff", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\x00"]) + b'"}}',
        lambda: b'{"config": {"\\ud800": "\\udfff", "\\u0000": "\\u0000"}}',
        lambda: b'{"\\ud800": 1}',
        lambda: b'{"config": {"x": "' + b"y" * rng.choice([1000, 300_000]) + b'"}}',
        lambda: json.dumps({"config": {str(n): n for n in range(rng.choice([10, 5000]))}}).encode(),
        lambda: json.dumps({f"k{n}": n for n in range(2000)}).encode(),
        lambda: rng.randbytes(rng.randrange(200)),
        lambda: b"timeout=60&config=x",
        lambda: b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><a>&b;</a>",
        lambda: word(rng).encode(),
        lambda: rng.choice([b"null", b"true", b"[]", b'"x"', b"1", b"[{}]", b"{", b"}", b"[", b'{"a"', b"{'a': 1}"]),
    ]  # fmt: skip
    return rng.choice(specials)()
