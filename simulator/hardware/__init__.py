"""What devices can do and what models ask of them."""
