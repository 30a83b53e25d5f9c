"""The audit: what an erased model still gives away, measured by small pure functions and judged by stated thresholds."""
