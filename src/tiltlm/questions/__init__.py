"""Questions with an answer that can be checked: what is asked, how it is put to a model, how an answer is graded."""

from __future__ import annotations
