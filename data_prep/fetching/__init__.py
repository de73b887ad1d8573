"""Download the images or audio clips of a table of URLs."""
