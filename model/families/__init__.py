"""One short file per family: its schema, as data."""
