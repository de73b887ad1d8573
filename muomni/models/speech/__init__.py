"""Audio encoder, speech codec, Talker, and vocoder."""
