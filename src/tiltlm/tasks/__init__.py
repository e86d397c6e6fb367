"""Tasks: one file each, a frozen value whose fields are its settings, and which makes a `Problem`."""
