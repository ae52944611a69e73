"""The bundle: what export/ writes and the daemon loads."""
