"""Structured comparison of the methods: tasks, learning-rate sweep, cost, report.

`python -m funcprecond compare` is its command line. Everything here is a client of the library's
public names; nothing in the library needs it.
"""
