"""The Thinker, and its conversion from and to published formats."""
