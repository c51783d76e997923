"""Differentiation: one forward run of a model, and all derivatives that are taken of it."""
