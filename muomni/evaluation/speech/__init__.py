"""Error rates of generated speech, judged by speech recognition."""
