"""Conversations with a trained model, in the terminal and in the browser."""
