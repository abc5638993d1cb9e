"""`python -m nope` is the command `nope`."""

import sys

INTERRUPTED = 130


def main() -> None:
    """Start the command; Ctrl-C while it loads is as quiet as later on."""
    try:
        from reports.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
