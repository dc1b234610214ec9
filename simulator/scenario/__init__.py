"""The scenario: every table of its TOML file, the checks across tables, and how files are read."""
