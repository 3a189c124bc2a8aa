"""`python -m turbosparse` is the command line."""

from turbosparse.cli import main

main()
