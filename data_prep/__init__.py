"""Convert raw corpora to WebDataset shards: readers, sharding, tokenizer training, and reports.

Depends on the torch-free part of `muomni.data` (shard format, decoders, tokenizer), not on models or
DeepSpeed.
"""
