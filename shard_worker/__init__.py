"""The data plane: one process per device, which holds one shard of the model and executes steps."""
