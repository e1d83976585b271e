"""What measures and shows any paper, and knows none."""
