"""Many runs beside each other: reads their folders, compares what they reach, draws it."""
