"""Which rows a run reads, in which order, from one dataset or several."""
