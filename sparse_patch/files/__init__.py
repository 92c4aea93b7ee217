"""Files: they are read within limits, and written as a whole or not at all."""
