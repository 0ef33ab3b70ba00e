"""How a run starts: settings that follow from others, more steps, a config for new data."""
