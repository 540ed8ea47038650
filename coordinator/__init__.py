"""The control plane: plans the shards, batches requests, drives the workers, turns tokens into text."""
