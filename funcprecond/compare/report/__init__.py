"""The report of a comparison: a table on the terminal, a CSV file, plots, and an HTML page."""
