"""The job of `paceline calibrate` and its study of long contexts."""
