"""Stage 3: how it is solved with. `prepare` is dear, `apply` is cheap."""
