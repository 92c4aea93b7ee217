"""Ways to score keys, from which methods make their plans."""
