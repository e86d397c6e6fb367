"""Tasks: frozen dataclasses, one a file, that say what must be built and then make a `Problem`."""
