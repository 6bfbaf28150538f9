"""Documents out of the files that people have: lines of JSON, plain or compressed, text, and parquet."""
