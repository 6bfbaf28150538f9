"""Many runs: sweeps that start them, comparisons that judge them."""
