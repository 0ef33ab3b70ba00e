"""What a run shows of itself: figures while it trains, and a page of it."""
