"""The mode ``spacing``: sampling grids of a trained run, compared, searched, stored and drawn."""
