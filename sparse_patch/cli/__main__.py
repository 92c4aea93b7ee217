"""`python -m sparse_patch.cli`, where a launcher wants a module."""

from sparse_patch.cli import main

main()
