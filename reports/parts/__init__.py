"""The parts of a report: each answers one question, in a module of its own."""
