"""The first question: does speculation pay, with which drafter, how long a draft, at which batch size."""
