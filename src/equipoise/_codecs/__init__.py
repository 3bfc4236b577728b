"""What models become in a file, and how they are built again from what a stranger may have written."""
