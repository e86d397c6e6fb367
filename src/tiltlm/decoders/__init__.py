"""Methods that train nothing of their own: what draws, and what can be said of it. One file each."""
