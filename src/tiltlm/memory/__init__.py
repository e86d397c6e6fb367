"""The memory that a training takes, before any work: networks without weights, run on tensors without numbers.

`network.py` makes a network of its configuration alone and counts what it holds and what a pass through it keeps;
`process.py` adds up what one of several processes holds at each part of a step.
"""
