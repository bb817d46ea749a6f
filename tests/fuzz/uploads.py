"""Harmful uploads: a cortex.yaml, an archive, and the multipart form around them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from fuzz import odd_values
from fuzz.archives import PLANTED, archive, packed, project
from fuzz.raw_http import Case, request
from fuzz.routes import World

YAMLS = [
    b'- name: up\n  kind: TaskAPI\n  definition: {command: ["true"]}\n  compute: {cpu: 1m}\n',
    b'- name: up\n  kind: TaskAPI\n  definition:\n    command: ["true"]\n    config: {a: 1, b: [1, 2.5, null], on: yes}\n'
    b'    env: {A: b}\n    log_level: debug\n  networking: {endpoint: /up.x}\n  compute: {cpu: 1m, mem: 64Mi, gpu: 0}\n',
    b'- &a\n  name: up\n  kind: TaskAPI\n  definition: &d\n    command: ["true"]\n- <<: *a\n  name: up-2\n'
    b"  definition:\n    <<: [*d, {config: {x: 1}}]\n",
    b"- name: up\n  kind: TaskAPI\n  definition: {path: task.py, python_path: lib}\n",
    b'[{"name": "up", "kind": "TaskAPI", "definition": {"command": ["true"], "config": {"x": "\\ud834\\udd1e"}}}]',
]  # fmt: skip
BROKEN_YAMLS = [
    b"", b"-", b"[]", b"{}", b"null", b"- name: up\n", b"- name: Up_\n  kind: RealtimeAPI\n", b"\t- a", b"a: b: c",
    b"- !!python/object/apply:os.system [id]", b"- !!python/name:os.system", b"- !<tag:x> {}", b"&a [*a]",
    b"a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\nd: [*c, *c, *c]\n", b"? [a]\n: b\n", b"? {a: b}\n: c\n",
    b"- name: up\n  name: up\n", b"%YAML 1.1\n---\n- a\n...\n---\n- b\n", b"- 2001-12-14t21:59:43.10-05:00", b"- 1:30:00",
    b"- !!binary R0lGODlh", b"- !!set {a, b}", b"- !!omap [a: 1]", b"- .nan", b"- .inf", b"- 0x_", b"- 0b2", b"- 1e999",
    b"- !!int x", b"- !!float x", b"- !!bool x", b"- !!null x", b"- !!timestamp x", b"- !!merge <<", b"- <<: *nothing",
    b"- <<: 1\n- <<: [1, {}]\n", b'- "\\x0"', b'- "\\U00110000"', b'- "\\ud800"', b'- "\\uD83D\\uDE00"', b"- |9\n  x",
    b"- name: up\n  kind: TaskAPI\n  definition: {path: 'a\\0b'}\n", b"= ", b"- =", b"- !", b"- !!", b"- !!str\n- !!map\n",
    b'- name: up\n  kind: TaskAPI\n  definition: {path: "\\0"}\n', b"- name: up\n  kind: TaskAPI\n  definition: {path: ../x.py}\n",
    b"- name: up\n  kind: TaskAPI\n  definition: {path: %s.py}\n" % (b"a" * 300),
    b"- name: up\n  kind: TaskAPI\n  definition: {path: %s.py, python_path: %s}\n" % (b"a/" * 2500, b"b" * 5000),
    b'- name: up\n  kind: TaskAPI\n  definition: {command: ["true"], env: {A: "\\0", "=": x, CORTEX_X: y}}\n',
    b'- name: up\n  kind: TaskAPI\n  definition: {command: ["true"]}\n  compute: {cpu: 1e400, mem: 9e99, gpu: -1}\n',
    b'- name: up\n  kind: TaskAPI\n  definition: {command: ["true"]}\n  compute: {cpu: .inf, mem: .nan, gpu: 1e9}\n',
    b'- name: up\n  kind: TaskAPI\n  definition: {command: ["true"], config: {x: %s}}\n' % (b"9" * 5000),
]  # fmt: skip


def yaml_text(rng: random.Random) -> bytes:
    """A cortex.yaml, valid, broken or harmful."""
    return rng.choices(_YAML_TEXTS, [1, 4, 2, 1, 1, 1, 1, 1])[0](rng)


def _encoded(rng: random.Random) -> bytes:
    encoding = rng.choice(["utf-16", "utf-16-be", "utf-32", "utf-8-sig", "latin-1", "utf-7"])
    return (rng.choice(YAMLS).decode() + "# ä\n").encode(encoding)


def _nested(rng: random.Random) -> bytes:
    depth = rng.choice([50, 99, 101, 500, 5000, 500_000])
    opened, closed = rng.choice([(b"[", b"]"), (b"{a: ", b"}"), (b"- ", b""), (b"? ", b"")])
    config = opened * depth + closed * rng.choice([depth, 0])
    return rng.choice([config, YAMLS[0] + b"  networking: " + config])[: (1 << 20) + 10]


def _structured(rng: random.Random) -> bytes:
    """An entry whose fields have values of other types."""

    def some(usual: object) -> object:
        return usual if rng.random() < 0.6 else odd_values.json_value(rng, 2)

    entry = {
        "name": some("up"),
        "kind": some("TaskAPI"),
        "definition": some({
            rng.choice(["command", "command", "path", odd_values.word(rng)]): some(["true"]),
            rng.choice(["config", "env", "python_path", "log_level"]): some({"A": odd_values.word(rng)}),
        }),
        rng.choice(["networking", odd_values.word(rng)]): some({"endpoint": some("up")}),
        "compute": some({"cpu": some("1m"), "mem": some(rng.choice(odd_values.NUMBERS)), "gpu": some(0)}),
    }  # fmt: skip
    return json.dumps([entry] * rng.choice([1, 1, 2]), ensure_ascii=rng.random() < 0.5).encode()


def _billion_laughs(rng: random.Random) -> bytes:
    """A few bytes that aliases expand to many."""
    levels, width = rng.choice([(4, 3), (9, 9), (30, 2), (50, 10), (3, 1000)])
    lines = [b"a0: &a0 [x, x]"]
    for level in range(1, levels):
        merged = rng.random() < 0.2
        aliases = b", ".join([b"*a%d" % (level - 1)] * width)
        line = b"a%d: &a%d {<<: [%s]}" if merged else b"a%d: &a%d [%s]"
        lines.append(line % (level, level, aliases))
    return b"\n".join(lines) + b"\n"


_YAML_TEXTS: list[Callable[[random.Random], bytes]] = [
    lambda rng: rng.choice(YAMLS),
    lambda rng: odd_values.mutated(rng, rng.choice(YAMLS), 6),
    lambda rng: odd_values.mutated(rng, rng.choice(BROKEN_YAMLS), 3),
    lambda rng: rng.choice(BROKEN_YAMLS),
    _structured,
    _billion_laughs,
    _encoded,
    _nested,
]


_FILENAMES = [
    b"cortex.yaml", b"", b".", b"..", b"../" + PLANTED.encode(), b"/etc/passwd", b"a\0b", b"a" * 300, b"a" * 5000,
    b"\xff", b"task.py", b"lib", b"lib/", b"\xed\xa0\x80", b".env", b"a\\..\\b", b"C:\\x", b"\xe2\x98\x83", b"a%00b", b"~",
]  # fmt: skip
_CHARSETS = [
    b"undefined",
    b"punycode",
    b"idna",
    b"utf-16",
    b"rot13",
    b"hex",
    b"unicode_escape",
    b"x",
    b"",
    b"utf-7",
]


def upload(rng: random.Random, world: World) -> Case:
    """A deploy with an odd cortex.yaml, archive or form."""
    is_form = rng.random() < 0.25
    yaml = rng.choice(YAMLS) if is_form else yaml_text(rng)
    tar = packed(project(rng)) if is_form or rng.random() < 0.4 else archive(rng)
    filename = b"cortex.yaml" if rng.random() < 0.7 else rng.choice(_FILENAMES)
    parts = [
        _part(b'name="config"; filename="%s"' % filename, yaml),
        _part(b'name="project"; filename="p.tar.gz"', tar),
    ]
    if rng.random() < 0.2:
        parts.append(
            _part(b'name="force"', rng.choice([b"false", b"true", b"", b"x", b"\xff", b"\0"]))
        )
    content_type = b"multipart/form-data; boundary=fuzz"
    body = b"".join(b"--fuzz\r\n" + part + b"\r\n" for part in parts) + b"--fuzz--\r\n"
    if is_form:
        content_type, body = rng.choice(_FORMS)(rng, parts, content_type, body)
    headers = [(b"Host", world.host), *world.headers, (b"Content-Type", content_type)]
    return Case(request("POST", "/-/apis", headers, body), "POST")


def _part(disposition: bytes, content: bytes) -> bytes:
    return b"Content-Disposition: form-data; " + disposition + b"\r\n\r\n" + content


_Form = Callable[[random.Random, list[bytes], bytes, bytes], tuple[bytes, bytes]]


def _framed(parts: list[bytes]) -> bytes:
    return b"".join(b"--fuzz\r\n" + part + b"\r\n" for part in parts) + b"--fuzz--\r\n"


def _form_type(
    rng: random.Random, parts: list[bytes], kind: bytes, body: bytes
) -> tuple[bytes, bytes]:
    types = [
        b"multipart/form-data", b"multipart/form-data; boundary=", b"multipart/form-data; boundary=other",
        b'multipart/form-data; boundary="fuzz', b"multipart/form-data; boundary=" + b"b" * 5000, b"multipart/mixed; boundary=fuzz",
        b"application/x-www-form-urlencoded", b"application/json", b"", b"multipart/form-data; boundary=\xff",
        kind + b"; charset=" + rng.choice(_CHARSETS), kind + b"; boundary=two",
    ]  # fmt: skip
    return rng.choice(types), body


def _form_parts(
    rng: random.Random, parts: list[bytes], kind: bytes, body: bytes
) -> tuple[bytes, bytes]:
    extra = [
        _part(b'name="config"', b"not a file"), _part(b'name="project"', b"not a file"), _part(b'name=""', b""),
        _part(b'filename="x"', b""), _part(b"", b""), b"\r\n\r\n", b"X: y\r\n\r\nz", b"", b"\xff: \xff\r\n\r\n",
        b"X: " + b"y" * 20_000 + b"\r\n" + parts[0], b"X: y\r\n" * 500 + parts[0], _part(b'name="config"; filename*=utf-8\'\'x', b""),
        _part(b'name="' + b"n" * 5000 + b'"', b""), _part(b'name="\xff"; filename="\xff"', b"\xff"), *parts,
        b"Content-Type: text/plain; charset=" + rng.choice(_CHARSETS) + b"\r\n" + parts[0],
        b"Content-Transfer-Encoding: base64\r\n" + parts[0],
    ]  # fmt: skip
    chosen = rng.sample(
        [*parts, *(rng.choice(extra) for _ in range(3))], rng.randrange(6) % (len(parts) + 3)
    )
    if rng.random() < 0.02:
        chosen = [_part(b'name="x"', b"y")] * 1001 + parts
    return kind, _framed(chosen)


def _form_bytes(
    rng: random.Random, parts: list[bytes], kind: bytes, body: bytes
) -> tuple[bytes, bytes]:
    return kind, odd_values.mutated(rng, body, 6)


def _form_charset(
    rng: random.Random, parts: list[bytes], kind: bytes, body: bytes
) -> tuple[bytes, bytes]:
    named = parts[0].replace(b'filename="', b'filename="' + rng.choice(_FILENAMES), 1)
    return kind + b"; charset=" + rng.choice(_CHARSETS), _framed([named, *parts[1:]])


_FORMS: list[_Form] = [_form_type, _form_parts, _form_bytes, _form_charset]
