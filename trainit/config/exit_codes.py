"""How a command ends. Launch scripts and sweeps start a run again that ended with STOPPED."""

DONE = 0  # all is done
FAILED = 1  # anything that is not the user's to correct
USAGE = 2  # a wrong config or wrong flags
DAMAGED = 70  # a device has computed or kept wrong numbers: see cluster/device_checks.py
STOPPED = 75  # stopped on request, with everything saved
