"""How much spare room a growing buffer keeps behind its content."""

SPARE = 256  # tokens beyond those asked for
