"""Rewards. A reward is a callable `Samples -> Tensor [N]`, float; adding one is one file here and its test."""
