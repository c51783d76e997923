"""Derivatives that replace those of torch, listed in :mod:`funcprecond.autodiff.rules.table`."""
