"""Files: run folders, sessions, sealed documents. Needs no torch."""
