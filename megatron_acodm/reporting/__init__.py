"""Shows what happened in a run, from the files in its directory: a table, plots, a page."""
