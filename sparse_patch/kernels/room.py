"""How much room a buffer that grows has behind what is in it."""

SPARE = 256  # tokens beyond what is asked for
