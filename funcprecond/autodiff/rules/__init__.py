"""Derivatives that replace torch's own; :mod:`funcprecond.autodiff.rules.table` lists them."""
