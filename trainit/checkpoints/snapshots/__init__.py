"""Copies of a run's state on the hosts themselves, for a restart after a process or a host was lost."""
