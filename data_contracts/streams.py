"""Contracts - a command's standard streams: closed ones (`2>&-`) are opened, and a reader that leaves (`| head -1`) ends
no work.

Called once, first of all, by a process that was started as a command.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TextIO


class _Output(io.FileIO):
    """A standard stream; once nobody reads it any more, what is written goes nowhere."""

    def write(self, data: object, /) -> int:
        """Write bytes and return how many were taken."""
        try:
            return super().write(data)  # pyright: ignore[reportArgumentType] - whatever FileIO takes
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return super().write(data)  # pyright: ignore[reportArgumentType]


def open_standard_streams() -> None:
    """Make sure that descriptors 0 to 2 are open and that writing to 1 and 2 never fails for want of a reader.

    A descriptor that is closed would be given to the next file that is opened, and what a library prints would be
    written into that file.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError as error:
            if error.errno == errno.EBADF:
                os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
                os.set_inheritable(descriptor, True)
    sys.stdout = sys.__stdout__ = _text(1, sys.stdout)
    sys.stderr = sys.__stderr__ = _text(2, sys.stderr)


def _text(descriptor: int, before: TextIO | None) -> TextIO:
    """Return a text stream on the descriptor with the encoding and buffering of the one before."""
    if before is not None:
        before.flush()
    encoding = getattr(before, "encoding", None) or "utf-8"
    raw = _Output(descriptor, "w", closefd=False)
    is_line_buffered = descriptor == 2 or getattr(before, "line_buffering", False)
    through = bool(getattr(before, "write_through", False))
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=is_line_buffered, write_through=through
    )
