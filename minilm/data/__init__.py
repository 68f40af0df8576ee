"""What is read, and in what order."""
