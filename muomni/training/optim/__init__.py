"""Parameter groups, learning-rate schedule, and Muon."""
