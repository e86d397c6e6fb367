"""tiltlm: state pi* ∝ pi_ref · exp(r / beta), reach it by any road, measure in nats how close you came."""

__version__ = "0.1.0"
