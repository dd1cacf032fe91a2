"""Rules at work: whom they speak of, how they reach every process, what they decide, and the demand they meet."""
