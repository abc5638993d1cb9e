"""`python -m nope` is the command `nope`."""

import os
import sys

INTERRUPTED = 130


def _open_streams() -> None:
    """Send what is printed nowhere where standard output or error is closed (`>&-`).

    Else the next file to be opened, perhaps the evidence, would have their number.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)  # inherited by workers
            if nowhere != number:
                os.close(nowhere)
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))


def main() -> None:
    """Start the command; Ctrl-C while it loads is as quiet as later on."""
    _open_streams()
    try:
        from reports.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
