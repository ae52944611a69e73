"""From an accepted request to its events: admission, sessions, scheduling."""
