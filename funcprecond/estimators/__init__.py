"""Traces, diagonals, spectra, eigenpairs and statistics of a batch's gradients."""
