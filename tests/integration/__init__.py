"""Real workers, real brokers, real stores."""
