"""The methods: one file a row of the table, each a curvature, a representation and a solver."""
