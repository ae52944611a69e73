"""What this machine is: processor, device files, execution providers."""
