"""The search for MoA's plans: a span for each KV head, elastic in the length (Fu et al. 2024, arXiv 2406.14909).

`prompts` long prompts whose answers depend on distant text -> `influence` what it changes, to first order, that a
head does not read what is far -> `rules` and `optimise` the plans of least change within a density -> `validate`
which of them costs least at another length. `search` runs it all."""
