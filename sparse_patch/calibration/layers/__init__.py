"""The search for selecting layers: the layers at which decode should choose keys, so that later layers find theirs.

TidalDecode, LessIsMore and DELTA run the first layers and a few others densely. Some of these dense layers choose keys,
and the layers after them read only these keys until the next layer chooses. Which layers choose well is a property of
the model: in Llama-3 and in needle-llama everything depends on one layer, and with the layer before it everything is
lost.

A model reads a few long prompts with their answers in one dense forward. Some tokens of the answer stand for decode
queries. The attention of every layer at these tokens, over all keys before them, shows what each layer would have found
in the lists of every earlier layer. The first tokens and the last ones do not count: most of the attention lies on
them, in every layer, and any list has them. What a model looks up far back is a small share, and all that a list can
lose.

- mass: the share of a layer's attention to far tokens that lies on the `budget` far keys with the most attention in the
  earlier layer. It is measured for lists per query head (TidalDecode, arXiv 2410.05076) and for one list of all heads,
  ranked by the maximum of the probability over heads (DELTA, arXiv 2510.09883);
- overlap: the share of its own best far keys that the list contains (TidalDecode's measure);
- jump: 1 - cosine of the attention of neighbouring layers, with the maximum over heads (DELTA's measure).

The first `full` layers stay dense and the next one selects. Of all sets of `--select` layers after it, the search
chooses the set that leaves the most mass to the sparse layers, as the mean over these layers and over both kinds of
lists, because a file serves methods of either kind. A layer counts by how much it attends to far tokens. The criterion
is mass and not overlap, because missing a key without weight is no loss. On needle-llama the mean finds layer 5 at 2k,
4k and 8k tokens. The worst sparse layer points to the same layer even more clearly, and so do overlap and jump.
"""
