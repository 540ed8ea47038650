"""What the command reports in one line, apart from what services answer (`colrow.errors`)."""


class ClusterError(Exception):
    """The processes did not come up, or did not stay up; the message says which and why."""
