"""What the commands do, as functions that print for people; one module is imported per command."""
