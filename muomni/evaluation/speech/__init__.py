"""Error rates of generated speech, measured by speech recognition."""
