"""What is on disk: manifests, tar shards with their indexes, local caches of remote ones."""
