"""The commands of `tiltlm`, one file each; `cli.py` imports the one that is asked for."""
