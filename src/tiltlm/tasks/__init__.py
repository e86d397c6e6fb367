"""Where x comes from and when y is right: prompts, splits, answers, checkers."""
