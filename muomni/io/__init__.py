"""Atomic writes, file locks, hashing, and remote folders. Imported by every other package."""
