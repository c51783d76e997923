"""A comparison of the methods: tasks, learning-rate sweeps, cost measurements, and a report.

The command is `python -m funcprecond compare`. This package uses the library, and the library does
not depend on it.
"""
