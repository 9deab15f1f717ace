"""``python -m svdexport`` is the command line."""

from svdexport.cli import main

main()
