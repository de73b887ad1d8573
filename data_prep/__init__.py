"""Raw corpora to WebDataset shards: readers, sharder, tokenizer training, checks and reports.

Uses the light half of `muomni.data` (format, decoders, tokenizer), never models or DeepSpeed.
"""
