"""A peer: the program that volunteers run and the library that others embed."""
