"""The search for selection layers: where decode should choose keys, so that the layers behind find theirs among them.

TidalDecode, LessIsMore and DELTA run the first layers and a few others densely. Those choose keys, and the layers that
follow read these alone until the next one chooses. Which layers choose well is a property of the model: in Llama-3 and
in needle-llama everything hangs on one layer, and the one before it loses everything.

A model reads a few long prompts with their answers in one dense forward. For some tokens of the answer, the queries of
decode, the attention of every layer over all keys before them says what each layer would have found in the lists of
every layer before it:

- mass: the share of its attention that lies on the `budget` keys which the other layer likes best; for lists per query
  head (TidalDecode, arXiv 2410.05076) and for one list of all heads, by the maximum of the probability over heads
  (DELTA, arXiv 2510.09883);
- overlap: the share of its own best keys among them, TidalDecode's measure;
- jump: 1 - cosine of the attention of neighbouring layers, the maximum over heads: DELTA's measure.

The first `full` layers stay dense, the next one selects, and of the sets of `--select` layers after it that one is
chosen which leaves the most mass to the sparse layers, mean over them and over both kinds of lists: a file serves
methods with either. Mass, not overlap: a key without weight is no loss. On needle-llama the mean finds its layer 5 at
2k, 4k and 8k tokens; the worst sparse layer says the same still louder, and so do overlap and the jump.
"""
