"""Between the contract's messages and the coordinator's own types; protobuf stops here.

`users` is for InferenceService, `operators` for ControlService, `workers` for ShardWorkerService. What
several of them speak of has modules of its own: tensors, the plan, and a worker's description.
"""
