"""Methods: each decides which keys a query reads, and answers with a plan. One file each; `base` is the protocol."""
