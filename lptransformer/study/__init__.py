"""Many runs: sweeps, records, comparisons, reports."""
