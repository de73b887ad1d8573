"""Files: atomic writes, locks, remote folders. Imported by every other package."""
