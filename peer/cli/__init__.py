"""The command line. What is imported here at the top is light: help and status must not wait."""
