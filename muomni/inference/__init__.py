"""Generate text with a KV cache, and speech, from the exports of a run."""
