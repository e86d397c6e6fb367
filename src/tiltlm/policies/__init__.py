"""Learn pi_theta: one file per method, each a pure loss and the frozen settings that bind it to a model."""
