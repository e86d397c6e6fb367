"""Methods that draw and train nothing themselves."""
