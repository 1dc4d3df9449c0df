"""Passes stderr on, and makes one line of what JAX prints when it ends a process of a broken job.

Run as a program between a process and its stderr (multihost.py). JAX's coordination client aborts
the process from C++, after a page of internals; no code of the process runs any more then.
"""

import re
import signal
import sys
from collections.abc import Iterable, Iterator

ABORTS = b"Terminating process because the JAX distributed service detected fatal errors"
JOINING = b"/RegisterTask"
MISSED = re.compile(
    rb"stopped sending heartbeats\):\s*([^\n]*\d)|(\d+) unexpectedly tried to connect"
)
"""Processes that are silent, or were killed and already started again."""


def one_line(message: bytes) -> bytes:
    """What the user is told instead of `message`."""
    if JOINING in message:
        return (
            b"stopped: the processes of this job did not come together; do all of them run, with "
            b"the same coordinator?\n"
        )
    missed = MISSED.search(message)
    if missed:
        who = (
            b"process " + b", ".join(re.findall(rb"\d+", missed[1] or missed[2])) + b" of this job"
        )
    else:
        who = b"process 0 of this job, or the way to it,"
    return (
        b"stopped: " + who + b" is gone; its own output may say why. "
        b"The same command goes on from the last checkpoint\n"
    )


def passed(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines as they come, with the end of a broken job in one."""
    lines = iter(lines)
    for line in lines:
        if ABORTS in line:
            yield one_line(line + b"".join(lines))
        else:
            yield line


if __name__ == "__main__":
    # It outlives the process that it reads from, whatever signals reach the group of both.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for text in passed(sys.stdin.buffer):
        sys.stderr.buffer.write(text)
        sys.stderr.buffer.flush()
