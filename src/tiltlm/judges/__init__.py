"""Judges that score in the place of the reward, and learn from a trickle of it."""
