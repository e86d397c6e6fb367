"""Texts, graphs and conversations as rows and token ids: readers, encoders, generators, checkers."""
