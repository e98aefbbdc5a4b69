"""The engines of the local endpoint; each module is imported only when it is chosen."""
