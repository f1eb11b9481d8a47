"""Records -> tidy frames -> summary, roofline, cautions. Needs no torch."""
