"""Ways to execute a plan. Each reads exactly the keys that the plan lists and knows no method."""
