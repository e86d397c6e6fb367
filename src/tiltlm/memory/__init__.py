"""The memory that a training takes, before any work: networks without weights, run on tensors without numbers.

`making.py` makes a network of its configuration alone; `network.py` counts what it holds and what a pass through it keeps,
`head.py` what its output head does; `process.py` adds up what one of several processes holds at each part of a step.
"""
