"""Stage `sft`: joins all exports and fine-tunes on conversations."""
