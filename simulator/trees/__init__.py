"""Draft trees: static ones replayed by ranks, their optimisation, dynamic ones approximated."""
