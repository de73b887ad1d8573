"""The vision encoder and contrastive image-text training."""
