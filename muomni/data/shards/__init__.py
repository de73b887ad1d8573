"""Datasets on disk and at URLs: manifests, tar shards with indexes, and caches."""
