"""Products: a kernel for each technique, and what they share."""
