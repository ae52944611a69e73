"""What is kept of earlier work: KV of prefixes, whole answers, and what is asked often."""
