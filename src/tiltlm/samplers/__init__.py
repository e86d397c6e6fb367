"""Ways to draw y. Each ends in `Samples` with the log-probability of what was really drawn."""
