"""Encoded bytes to arrays: images and audio."""
