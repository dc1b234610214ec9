"""Graded quality: which items each stage of a cascade answers rightly, measured on real models.

A stage is an exit of one model, or a model. `builtin_items` or `read_items` give the questions, `run_grading` the
table of who was right; only that one needs torch.
"""
