"""The search for head schedules: a span for each KV head, elastic in the length (Fu et al. 2024, arXiv 2406.14909).

`prompts` makes long prompts whose answers depend on distant text. `influence` measures, to first order, how the loss
changes if a head does not read far keys. `schedules` and `optimise` find the schedules of least change within a
density. `validate` measures which of them cost least at another length. `search` runs all steps."""
