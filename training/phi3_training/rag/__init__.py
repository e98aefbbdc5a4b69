"""Documents: read, cut into passages, embedded and kept in one SQLite file that flows search."""
