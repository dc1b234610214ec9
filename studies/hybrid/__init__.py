"""How much of the gap between the best fixed draft and the oracle hybrid policies close."""
