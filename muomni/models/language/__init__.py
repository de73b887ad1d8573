"""The Thinker, its upcycling, and its conversion from and to Qwen3."""
