"""What people are shown, made of rows only."""
