"""Turns Ray's errors and output into a sentence for people. Ray's own text has colour codes, C++
stacks, RPC codes and dumps of many lines; the operator's log has all of it.

The driver, its link and the agents call `explain` for every text of Ray that becomes part of a
message.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

from cortex.worker.messages import shorten

_MAX_LENGTH = 300

_CONTROL = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)", re.DOTALL)
_CONNECTION = re.compile(
    r"(?:ipv[46]:(?P<address>\S+): )?(?:Failed to connect to remote host: |(?:recv|send)msg:\s*)?"
    r"(?P<failure>[Cc]onnection refused|[Cc]onnection reset by peer|[Cc]onnection timed out|"
    r"[Ss]ocket closed|[Nn]o route to host|[Nn]etwork is unreachable|[Bb]roken pipe|"
    r"[Dd]eadline [Ee]xceeded)"
)
_VERSIONS = re.compile(
    r"Version mismatch: .*?Ray: (\S+)\s+Python: (\S+)\s"
    r".*?started with:\s+Ray: (\S+)\s+Python: (\S+)",
    re.DOTALL,
)
_NO_HEAD = re.compile(r"Failed to connect to GCS [^.\n]*?within (\d+) seconds")
_KNOWN = (
    (re.compile(r"NodeAffinitySchedulingStrategy doesn't exist"), "its node has left the cluster"),
    (re.compile(r"because its node has died"), "its node has died"),
    (re.compile(r"FD Shutdown"), "the connection to it was closed"),
    (re.compile(r"The actor is restarting"), "Ray is starting it again"),
    (re.compile(r"because its worker process has died"), "its process has died"),
)
# A connection error in any other text may be one of the project's own.
_RPC = re.compile(r"rpc_code|RpcError|RPC error|ipv[46]:|failed to connect to all addresses")

# Lines of stacks, dumps and tracebacks. Ray indents the fields of its errors.
_NOISE_LINE = re.compile(
    r"^\s|^$|\(\+0x|^\*\*\*|\[state-dump\]|^Traceback |^During handling of the above exception|"
    r"^The above exception was|^StackTrace|^\(raylet\)|^ray::"
)
_EXCEPTION_LINE = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit)\b")
_TRACEBACK = re.compile(r'^Traceback |^\s+File ".*", line \d+|ray::', re.MULTILINE)
_NOISE = re.compile(
    r"^\[[^]]*\d\d:\d\d:\d\d[^]]*\]\s*(?:\(\w+\)\s*)?|"  # the head of a line of Ray's log
    r"\b[\w/.-]+\.(?:cc|h|cpp|pyx|py):\d+:?\s*|"
    r"\bray::\S+ \([^)]*\),?\s*|"
    r"\bRpcError:\s*|\bRPC error:\s*|\s*\brpc_code: \d+|"
    r"\bThe actor [0-9a-f]{16,} is unavailable: |"
    r"\s*The task may or may not have been executed on the actor\.|"
    r"\s*https?://\S+|"
    r"\s*\b(?:\w+ )?[Ii][Dd]: [0-9a-f]{16,}|\b[0-9a-f]{24,}\b|"
    r"\s*\b0x[0-9a-f]+\b|"
    r"^\w+Error: \[Errno \d+\] |"
    r"\s*\b(?:traceback: )?Traceback \(most recent call last\).*"
)


def explain(error: BaseException | str) -> str:
    """What an error says, in one line without a full stop.

    Args:
        error: a text of Ray, or any exception. The text of an exception that is not Ray's stays,
            but for colour codes and line ends.
    """
    text = _CONTROL.sub("", error if isinstance(error, str) else _text_of(error))
    is_rays = isinstance(error, str) or type(error).__module__.partition(".")[0] == "ray"
    said = _known(text) or (_remainder(text) if is_rays else text.strip())
    return shorten(said or _name_of(error), _MAX_LENGTH)


def explain_output(output: str) -> str | None:
    """The last message in the output of a process that uses Ray, as `explain` gives it. None where
    the output has none."""
    plain = _CONTROL.sub("", output)
    lines = [line for line in plain.splitlines() if not _NOISE_LINE.search(line)]
    known = next((known for line in reversed(lines) if (known := _known(line))), None)
    return known or (explain(lines[-1]) if lines else None)


def _text_of(error: BaseException) -> str:
    if isinstance(error, TimeoutError) and not str(error):
        return "it did not answer in time"
    return str(error)


def _name_of(error: BaseException | str) -> str:
    return "Ray gives no reason" if isinstance(error, str) else type(error).__name__


def _known(text: str) -> str | None:
    """A sentence of our own for what Ray reports most often."""
    for pattern, sentence in _KNOWN:
        if pattern.search(text):
            return sentence
    if found := _VERSIONS.search(text):
        return "the cluster has Ray {} and Python {}, this process Ray {} and Python {}".format(
            *found.groups()
        )
    if found := _NO_HEAD.search(text):
        return f"the head of the Ray cluster did not answer for {found[1]} s"
    if _RPC.search(text) and (found := _last(_CONNECTION, text)):
        failure = found["failure"][0].lower() + found["failure"][1:].lower()
        return f"{failure} ({unquote(found['address'])})" if found["address"] else failure
    return None


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    found = None
    for each in pattern.finditer(text):
        found = each
    return found


def _remainder(text: str) -> str:
    """Ray's own words, without its noise. A traceback is reduced to its exception."""
    lines = text.splitlines()
    if _TRACEBACK.search(text):
        exceptions = [line for line in lines if _EXCEPTION_LINE.search(line)]
        lines = exceptions[-1:] or lines
    kept = [_NOISE.sub("", line) for line in lines if not _NOISE_LINE.search(line)]
    return " ".join(" ".join(kept).split()).rstrip(" .,:")
