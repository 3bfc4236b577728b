"""What the ``equipoise`` command starts with: an interruption while PyTorch is loaded, for a second or so, ends the
command as one during its work does, without a traceback. It stands beside the package, whose import is that second.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

__all__ = ["main"]


def main() -> int:
    """``equipoise.cli.main``, once it is there."""
    patient = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # and not ignored, as behind nohup
    if patient:
        signal.signal(signal.SIGINT, _leave)
    from equipoise.cli import main as command

    if patient:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return command()


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(130)  # nothing has been begun that would have to be put away
