"""Personal data: patterns, redaction of whole texts and of streams, filters."""
