"""The search for head schedules: a span for each KV head, elastic in the length (Fu et al. 2024, arXiv 2406.14909).

`prompts` long prompts whose answers depend on distant text -> `influence` what it changes, to first order, that a
head does not read what is far -> `schedules` and `optimise` those of least change within a density -> `validate` which
of them cost least at another length. `search` runs it all."""
