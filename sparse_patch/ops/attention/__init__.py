"""Ops that execute plans. Each reads exactly the keys that the plan lists and knows no method."""
