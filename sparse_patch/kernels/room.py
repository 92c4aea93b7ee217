"""How much spare room a growing buffer keeps after its content."""

SPARE = 256  # tokens beyond those asked for
