"""Learn log psi: how promising a prefix is. One file per method; Q#, CD and FUDGE share `value.py`."""
