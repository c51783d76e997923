"""Stage 2: how the matrix is stored. One immutable dataclass a file, with the same small verbs."""
