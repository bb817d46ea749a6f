"""The output of commands: JSON for programs, tables for people, errors for both.

If stdout is not a terminal, there are no colours, and no text is cut or folded to a width.
"""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from cortex.cli.options import Format
from cortex.spec.times import parse_rfc3339

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from cortex.sdk import ApiView, JobOutline

_MARKER = "~~cortex~~"
_UNLIMITED = 1_000_000
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_COPYABLE = frozenset({"job", "version", "endpoint", "operator endpoint"})
_STATUS_TEXTS = {"status_worker_oom": "out of memory"}
_STYLES = {
    "status_running": "cyan",
    "status_succeeded": "green",
    "status_stopped": "yellow",
    "status_timed_out": "yellow",
    "status_unknown": "magenta",
}


def print_json(answer: object, output: Format) -> None:
    """Print the operator's answer, and nothing else, on stdout."""
    if output is Format.MIXED:
        encoded = base64.b64encode(json.dumps(answer).encode()).decode()
        print_line(f"{_MARKER}{encoded}{_MARKER}")
    else:
        print_line(json.dumps(answer, indent=2, ensure_ascii=False))


def print_line(text: str) -> None:
    """Print a line on stdout, unchanged."""
    sys.stdout.write(f"{text}\n")


def print_error(message: str) -> None:
    """Print an error on stderr."""
    sys.stderr.write(f"error: {message}\n")


def print_note(text: str) -> None:
    """Print a note about the progress on stderr, at once."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def show(body: RenderableType) -> None:
    """Print a table or text for people on stdout."""
    screen = console()
    if sys.stdout.isatty():
        screen.print(body, crop=False)
        return
    with screen.capture() as printed:
        screen.print(body)
    for line in printed.get().splitlines():
        print_line(line.rstrip())


def console() -> Console:
    """The console on stdout. It does not interpret markup, because texts may come from users."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    return Console(
        force_terminal=terminal,
        width=None if terminal else _UNLIMITED,
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=False,
    )


def table(headings: Sequence[str], rows: Iterable[Sequence[RenderableType]]) -> Table:
    """A table without lines. Cells are folded to a narrow terminal, except in columns of values
    that people copy: the terminal wraps those."""
    from rich.table import Table

    cells = list(rows)
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, heading in enumerate(headings):
        width = max((len(str(row[index])) for row in cells), default=0)
        is_copyable = heading in _COPYABLE
        made.add_column(
            heading, overflow="fold", no_wrap=is_copyable, min_width=width if is_copyable else None
        )
    for row in cells:
        made.add_row(*(visible(cell) if isinstance(cell, str) else cell for cell in row))
    return made


def fields(pairs: Iterable[tuple[str, RenderableType]]) -> Table:
    """A table of names and values, one pair per line."""
    from rich.table import Table

    made = Table.grid(padding=(0, 2, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in pairs:
        made.add_row(name, visible(value) if isinstance(value, str) else value)
    return made


def visible(text: str) -> str:
    """Text from a job with its control characters escaped: they must not reach the terminal."""
    return _CONTROL.sub(lambda found: repr(found.group())[1:-1], text)


def hints(api: ApiView) -> list[str]:
    """The operator's advice about an API, each piece in one line."""
    return [visible(" ".join(hint.split())) for hint in api.get("hints", [])]


def status_text(job: JobOutline) -> RenderableType:
    """A job's status for people, coloured."""
    from rich.text import Text

    status = job["status"]
    shown = _STATUS_TEXTS.get(status, status.removeprefix("status_").replace("_", " "))
    counts = job.get("worker_counts", {})
    if status == "status_running" and counts.get("pending") and not counts.get("running"):
        shown += " (waiting)"
    return Text(shown, style=_STYLES.get(status, "red"))


def ago(time: str) -> str:
    """The time since then: `3m12s ago`."""
    return f"{_span((datetime.now(UTC) - parse_rfc3339(time)).total_seconds())} ago"


def local_time(time: str) -> str:
    """The time in this machine's time zone."""
    return parse_rfc3339(time).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def duration(job: JobOutline) -> str:
    """The duration of a job, up to now if it has not ended."""
    end = job.get("end_time")
    until = parse_rfc3339(end) if end else datetime.now(UTC)
    seconds = (until - parse_rfc3339(job["start_time"])).total_seconds()
    return _span(seconds) if end else f"{_span(seconds)} so far"


def _span(seconds: float) -> str:
    if seconds < 10:
        return f"{max(0.0, seconds):.1f}s"
    whole = round(seconds)
    units = [("d", whole // 86400), ("h", whole // 3600 % 24), ("m", whole // 60 % 60)]
    units.append(("s", whole % 60))
    largest = next(i for i, (_, count) in enumerate(units) if count)
    return "".join(f"{count}{unit}" for unit, count in units[largest : largest + 2] if count)
