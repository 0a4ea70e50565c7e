"""What a federation of real processes costs, and what it costs when one of them fails."""
