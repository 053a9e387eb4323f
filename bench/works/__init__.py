"""The works of the bench, a module each."""
