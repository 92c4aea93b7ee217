"""Ops: ways to execute a plan. An op reads exactly the keys that a plan lists and knows no method."""
