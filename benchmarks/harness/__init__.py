"""What the suites share: paired timing, the machine, results, reports."""
