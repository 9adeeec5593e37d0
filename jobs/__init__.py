"""What was asked for: specification, plan, state, record and report of a job. Knows no torch."""
