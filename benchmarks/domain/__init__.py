"""How a domain bundle understands people it has never heard."""
