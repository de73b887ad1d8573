"""Rank discovery, collectives, and what ranks need before they start."""
