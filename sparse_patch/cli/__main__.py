"""`python -m sparse_patch.cli`, for launchers that need a module."""

from sparse_patch.cli import main

main()
