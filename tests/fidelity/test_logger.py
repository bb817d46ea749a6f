"""`cortex.logger` writes the same lines in a job and in plain Python, and each line is JSON."""

from __future__ import annotations

import json
import re

import pytest

from fidelity.harness import Program, Runner
from fidelity.programs import program

HEAD = "from cortex.logger import logger\ndef task(config):\n"

PROGRAMS = [
    program("words", HEAD + "    logger.info('words %s', 3)\n"),
    program(
        "not-a-number",
        HEAD + "    logger.info('epoch', extra={'loss': float('nan'), 'best': [float('inf')]})\n",
    ),
    program(
        "keys-that-are-tuples", HEAD + "    logger.info('epoch', extra={'matrix': {(0, 1): 3}})\n"
    ),
    program(
        "objects", HEAD + "    logger.info('epoch', extra={'a': {1, 2}.__class__, 'b': b'x'})\n"
    ),
    program(
        "object-whose-repr-fails",
        HEAD
        + "    class Shy:\n        def __repr__(self):\n            raise ValueError\n    logger.info('x', extra={'shy': Shy()})\n",
    ),
    program(
        "itself",
        HEAD + "    loop = []\n    loop.append(loop)\n    logger.info('x', extra={'loop': loop})\n",
    ),
    program(
        "deep",
        HEAD
        + "    deep = []\n    for _ in range(100000):\n        deep = [deep]\n    logger.info('x', extra={'deep': deep})\n",
    ),
    program("surrogates", HEAD + "    logger.info('\\udcff', extra={'\\ud800': '\\udcff'})\n"),
    program("lines", HEAD + "    logger.warning('one\\ntwo')\n"),
    program(
        "error",
        HEAD
        + "    try:\n        1 / 0\n    except ZeroDivisionError:\n        logger.exception('failed')\n",
    ),
    program("wrong-arguments", HEAD + "    logger.info('%d words', 'no number')\n"),
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_logger_writes_the_same_json_line_as_in_plain_python(
    program: Program, runner: Runner
) -> None:
    job, plain = runner.run(program)
    assert _without_the_job(job.log) == _without_the_job(plain.log)
    lines = [json.loads(line, parse_constant=_refuse) for line in job.log.splitlines()]
    assert len(lines) == 1, job.log
    assert set(lines[0]) >= {"timestamp", "level", "message"}


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _without_the_job(log: str) -> str:
    return re.sub(r'"(timestamp|job_id|api_name)": ("[^"]*"|null)', r'"\1": ...', log)
