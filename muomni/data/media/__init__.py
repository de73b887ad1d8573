"""Decodes and resamples images and audio."""
