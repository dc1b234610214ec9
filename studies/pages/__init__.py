"""Pages of docs/ that are made from public measurements."""
