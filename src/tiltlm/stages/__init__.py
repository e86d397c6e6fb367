"""What can be built on disk, for any task and any method: exact draws, log Z, labels, learning, measuring, figures."""
