"""Examines a machine for shard workers: what is there, whether it works, what to do where it does not.

`python -m shard_worker.doctor` prints findings; `colrow doctor` shows them with its own. Whatever may
hang or crash, a call into a driver above all, is tried in a process of its own with a deadline.
"""
