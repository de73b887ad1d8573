"""Images and audio: checks, conversion, headers."""
