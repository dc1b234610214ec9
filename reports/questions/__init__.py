"""What each question says on a page: one file of words and one of figures."""
