"""Text to token ids: tokenizer, CTC units, the chat template."""
