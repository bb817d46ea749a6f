"""Writes the table of configuration.md from the fields of `Configuration`: `make docs`.

A test fails if the page differs from the output of this program.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_origin, get_type_hints

from cortex.operator.config.schema import Configuration, described, flag, variable

PAGE = Path(__file__).with_name("configuration.md")
BEGIN, END = "<!-- made by configuration.py -->\n", "<!-- end -->\n"


def table(configuration: type[Configuration]) -> str:
    """A row for each setting."""
    types = get_type_hints(configuration)
    rows = []
    for name, setting in described(configuration).items():
        is_several = get_origin(types[name]) is tuple
        default = configuration.model_fields[name].default
        cells = [
            f"`{name}`",
            f"`{flag(name)}`" + (", once for each" if is_several else ""),
            f"`{variable(name)}`" + (", with commas" if is_several else ""),
            setting.unset or _shown(default),
            f"{setting.help} {setting.docs}".rstrip(),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    head = "| setting in the file | flag | environment variable | default | |"
    return "\n".join([head, "| --- | --- | --- | --- | --- |", *rows, ""])


def _shown(default: object) -> str:
    if default in (None, ()):
        return "none"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def page(text: str) -> str:
    """The page with its generated part replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(Configuration)}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
