"""`python -m jobs` is the `gristmill` command."""

from jobs.cli import main

main()
