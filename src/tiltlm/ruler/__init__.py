"""The ruler: Samples + Target -> numbers with standard errors, the same for every method."""
