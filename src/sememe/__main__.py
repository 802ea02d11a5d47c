"""`python -m sememe` is the command line."""

from sememe.cli import main

main()
