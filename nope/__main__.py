"""`python -m nope` is the command `nope`."""

from reports.cli import main

main()
