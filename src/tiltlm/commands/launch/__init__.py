"""Many runs at once: `tiltlm run`, `tiltlm sweep` and `tiltlm measure` with `--jobs N`, `--on slurm`, `--on ray`.

What goes to a scheduler is a run whose inputs are done (`graph.py`), as an order that another process can carry out
(`order.py`). Each scheduler is one file: `local.py`, `slurm.py`, `ray.py`; `settings.py` says which, and with what.
"""
