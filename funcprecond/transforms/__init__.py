"""What is chained around a method."""
