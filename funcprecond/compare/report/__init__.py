"""How a finished comparison is shown: a table on the terminal, CSV, plots, one HTML page."""
